"""Code of Python's own standard library (PSF licence), cut into snippets of 40 to 120 bytes.

A snippet is a few whole lines that follow one another, without docstrings, comments and empty
lines, moved to the left. Of all that is drawn, no two snippets share a line of 16 characters or
more, or their first 64 bytes (what a sequence of 64 tokens holds).
"""

import ast
import functools
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
CONCURRENCY = ("asyncio", "concurrent", "multiprocessing", "queue.py", "sched.py", "threading.py",
               "_threading_local.py")  # fmt: skip
OTHERS = tuple(
    f"{name}.py"
    for name in """
    argparse ast calendar configparser copy csv dataclasses difflib fractions gzip inspect ipaddress
    optparse pickle random shutil statistics tarfile textwrap tokenize
""".split()
)
SHORTEST, LONGEST = 40, 120  # bytes of a snippet
_LINE, _START = 16, 64  # of a line that tells snippets apart; bytes of a snippet's start


@functools.cache
def drawn() -> tuple[list[str], list[str]]:
    """(snippets of modules about concurrency, of others), each in an order of its own, which is
    that of Python's version alone."""
    seen: set[str] = set()
    return _apart(CONCURRENCY, seen), _apart(OTHERS, seen)


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def _apart(names: tuple[str, ...], seen: set[str]) -> list[str]:
    """The snippets of modules, shuffled, less those that share something with one before."""
    paths = [path for name in names for path in _files(STDLIB / name)]
    found = [text for path in paths for text in cut(path.read_text(encoding="utf-8"))]
    random.Random(0).shuffle(found)
    kept = []
    for text in found:
        lines = {line.strip() for line in text.splitlines() if len(line.strip()) >= _LINE}
        marks = {*lines, text.encode()[:_START].decode(errors="ignore")}
        if not marks & seen:
            kept.append(text)
        seen |= marks
    return kept


def cut(source: str) -> Iterator[str]:
    """The snippets of a file."""
    lines, start = source.splitlines(), 0
    passed = _passed_over(source)
    while start < len(lines):
        end, text = start, ""
        while end < len(lines) and end not in passed and len(text.encode()) < SHORTEST:
            end += 1
            text = textwrap.dedent("\n".join(lines[start:end]).expandtabs()).strip()
        if SHORTEST <= len(text.encode()) <= LONGEST:
            yield text
        start = max(end, start + 1)


def _passed_over(source: str) -> set[int]:
    """Numbers, from 0, of the lines that are empty, comments, or in a string of several lines or
    one that stands alone."""
    passed = {number for number, line in enumerate(source.splitlines())
              if not line.strip() or line.lstrip().startswith("#")}  # fmt: skip
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else node
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            first, last = value.lineno - 1, value.end_lineno or value.lineno
            if last - first > 1 or value is not node:
                passed |= set(range(first, last))
    return passed
