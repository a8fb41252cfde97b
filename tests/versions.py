"""The tests of what Megatron-Core's versions have otherwise, on each of them: `make test-versions`.

    python tests/versions.py                       # every row of RELEASES
    python tests/versions.py 0.18.2 0.19.2         # some
    python tests/versions.py 0.19.2+torch==2.11.0  # with another torch
    python tests/versions.py ~/Megatron-LM         # sources that the index doesn't have yet

Each runs in an environment of its own in .versions/, which has the wheel of that Megatron-Core, and
what else is named, and nothing more: the other packages, CUDA's too, are those of the environment
that this file is run in. What is printed last is the README's table.
"""

import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".versions"
RELEASES = ("0.16.1", "0.17.1", "0.18.2", "0.19.2")  # the last of each minor version on the index

ATTACH = "test_options test_layouts test_off test_hosts"
LOOP = f"""test_versions test_megatron_flags test_needed {ATTACH} test_books test_auxiliary_losses
    test_script test_train test_train_rows test_packed test_lora_run"""
PROBE = """
import sys, torch, megatron.core
from megatron_dr.mcore.compat import versions
loop = versions.INSTALLED >= versions.OLDEST_LOOP
found = megatron.core.__version__, torch.__version__, sys.version  # some are 1.2.3+commit
print(megatron.core.__file__, *(version.split("+")[0].split()[0] for version in found), loop,
      sep="\\n")
"""
HEAD = ("megatron-core", "torch", "Python", "tested", "passed", "failed", "skipped", "minutes")


@dataclass(frozen=True)
class Found:
    """What an environment has: `loop`, whether its Megatron is supported for training, too."""

    megatron: str
    torch: str
    python: str
    loop: bool


def environment(name: str) -> Path:
    """Make it, if it isn't there; its interpreter.

    Args:
        name: a version, or a folder with Megatron's sources; with +PACKAGE==VERSION, a package too.
    """
    megatron, *more = name.split("+")
    sources = Path(megatron).resolve()
    folder = ENVIRONMENTS / "+".join([sources.name, *more])
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    wanted = [str(sources) if sources.is_dir() else f"megatron-core=={megatron}", *more]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    subprocess.run([*pip, *wanted], check=True)
    # only now, as pip would else find Megatron here, and with it what it has to do with
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    added = "; ".join(f"site.addsitedir({path!r})" for path in others)
    (packages / "others.pth").write_text(f"import site; {added}\n")
    (folder / "ready").touch()
    return python


def examine(python: Path) -> Found:
    """Raises SystemExit where the environment's own Megatron is not the one that is imported."""
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{python}: {done.stderr.strip().splitlines()[-1]}")
    file, megatron, torch, version, loop = done.stdout.splitlines()[-5:]
    if not Path(file).is_relative_to(python.parents[1]):
        raise SystemExit(f"{python} imports Megatron of {file}, not its own.")
    return Found(megatron, torch, version, loop == "True")


def run(python: Path, tests: str, report: Path) -> int:
    """pytest's exit code; its output goes to the screen."""
    files = [f"tests/mcore/{test}.py" for test in tests.split()]
    options = ["-q", "-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    options += ["-p", "no:cacheprovider", "-m", "not soak", f"--junitxml={report}"]
    return subprocess.run([python, "-m", "pytest", *options, *files], cwd=ROOT).returncode


def counts(report: Path) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, of a report in JUnit's format."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    number = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = number["failures"] + number["errors"]
    return number["tests"] - failed - number["skipped"], failed, number["skipped"]


def row(found: Found, of: tuple[int, int, int], seconds: float) -> str:
    tested = "attach, hosts, training" if found.loop else "attach, hosts"
    cells = (found.megatron, found.torch, found.python, tested, *of, round(seconds / 60))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """The exit code: 1 where a test failed."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=RELEASES, help="default: %(default)s")
    rows, failed = [], 0
    for name in parser.parse_args().versions:
        python = environment(name)
        found, began = examine(python), time.monotonic()
        report = python.parents[1] / "report.xml"
        report.unlink(missing_ok=True)
        code = run(python, LOOP if found.loop else ATTACH, report)
        if not report.exists():
            raise SystemExit(f"{name}: pytest ended with {code} before it began.")
        failed |= code
        rows.append(row(found, counts(report), time.monotonic() - began))
    print("", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows, sep="\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
