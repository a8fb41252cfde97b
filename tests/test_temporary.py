"""Temporary files are private: no source names a folder that others share, or guesses a name."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_dr"
SHARED = ("/tmp", "/var/tmp", "/dev/shm")
NAMES_THEM = PACKAGE / "rl" / "sandbox" / "apart.py"  # as places that it hides
GUESSED = ("mktemp", "gettempdir", "tempdir")


def test_no_source_names_a_shared_place() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value
            named = text and text.startswith(SHARED) and path != NAMES_THEM
            if named or isinstance(node, ast.Attribute) and node.attr in GUESSED:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found
