"""requirements.lock has what pyproject.toml asks of the demo and the tests, each with hashes."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_it_is_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", "")
    locked = {}
    for line in filter(lambda one: one and not one.startswith("#"), text.splitlines()):
        pinned, _, hashes = line.partition(" ")
        name, version = pinned.split("==")
        locked[canonicalize_name(name)] = version
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", hashes), name
    for asked in map(Requirement, [*project["dependencies"], *extras["demo"], *extras["test"]]):
        assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), asked
