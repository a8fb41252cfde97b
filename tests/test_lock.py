"""requirements.lock has what pyproject.toml asks of the demo and the tests, each with hashes.

The bill of materials is of the same.
"""

import json
import re
import subprocess
import sys
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


def _bill(lock: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "tools" / "sbom.py"), str(lock)]
    return subprocess.run(argv, capture_output=True, text=True)


def test_the_bill_of_materials_is_of_the_lock() -> None:
    lock = ROOT / "requirements.lock"
    bill = json.loads(_bill(lock).stdout)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    listed = [
        f"{one['name']}=={one['version']}"
        + "".join(f" \\\n    --hash=sha256:{held['content']}" for held in one["hashes"])
        for one in bill["components"]
    ]
    assert listed == [one.strip() for one in re.split(r"\n(?=\w)", lock.read_text())[1:]]
    purls = {one["purl"] for one in bill["components"]}
    assert len(purls) == len(listed) and all(one.startswith("pkg:pypi/") for one in purls)


def test_a_lock_without_hashes_has_no_bill(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("torch==2.6\n")
    done = _bill(tmp_path / "lock")
    assert done.returncode == 1 and "'torch==2.6' must be" in done.stderr and not done.stdout
