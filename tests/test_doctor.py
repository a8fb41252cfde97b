"""`megatron-dr doctor` on packages that are broken as people's are, put first on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dr.cli import doctor

ROOT = Path(__file__).parents[1]
TABLE = """
import sys
from megatron_dr.cli import doctor
names = sys.argv[1].split(",")
doctor.CHECKS = [check for check in doctor.CHECKS if check.name in names]
sys.exit(doctor.main([]))
"""


def examine(folder: Path, *names: str, at: Path = ROOT) -> tuple[int, str]:
    """The doctor's exit code and words, on some of its checks, where `folder` is first."""
    done = subprocess.run(
        [sys.executable, "-c", TABLE, ",".join(names)], capture_output=True, text=True, timeout=200,
        cwd=at, env=os.environ | {"PYTHONPATH": f"{folder}:{ROOT}", "COLUMNS": "200"},
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def package(folder: Path, name: str, code: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)


def line(said: str, name: str) -> str:
    (found,) = [text for text in said.splitlines() if text.startswith(f"{name} ")]
    return " ".join(found.split())


def test_a_healthy_place(tmp_path: Path) -> None:
    """This one: what the tests need is there, and its versions are those that are imported."""
    import numpy
    import psutil
    import torch

    names = [check.name for check in doctor.CHECKS if check.name != "Transformer Engine"]
    code, said = examine(tmp_path, *names)
    assert code == 0 and "mend" not in said, said
    assert line(said, "torch") == f"torch ok {torch.__version__}"
    assert line(said, "numpy") == f"numpy ok {numpy.__version__}"
    assert line(said, "psutil") == f"psutil ok {psutil.__version__}"
    assert line(said, "megatron-core").startswith("megatron-core ok 0.")
    assert line(said, "Python").startswith(f"Python ok 3.{sys.version_info.minor}.")


def test_the_empty_meta_package(tmp_path: Path) -> None:
    """As Transformer Engine's wheel is without its extras: it breaks Megatron's import too."""
    words = "Found empty `transformer-engine` meta package installed."
    package(tmp_path, "transformer_engine", f"raise RuntimeError({words!r})")
    code, said = examine(tmp_path, "Transformer Engine", "megatron-core")
    assert code == 1
    assert line(said, "Transformer Engine") == f"Transformer Engine BROKEN RuntimeError: {words}"
    assert "mend Transformer Engine: pip uninstall transformer-engine " in said
    assert f"BROKEN RuntimeError: {words}" in line(said, "megatron-core")


def test_a_stray_folder_called_apex(tmp_path: Path) -> None:
    """In the working directory, where `torchrun -m` finds it."""
    (tmp_path / "here" / "apex").mkdir(parents=True)
    code, said = examine(tmp_path, "NVIDIA apex", at=tmp_path / "here")
    assert code == 1 and "NVIDIA apex BROKEN" in line(said, "NVIDIA apex")
    assert f"mend NVIDIA apex: rename the folder {tmp_path / 'here' / 'apex'}: Megatron" in said


def test_the_wrong_apex(tmp_path: Path) -> None:
    package(tmp_path, "apex", "")
    code, said = examine(tmp_path, "NVIDIA apex")
    found = line(said, "NVIDIA apex")
    assert code == 1 and "BROKEN ModuleNotFoundError: No module named 'amp_C'" in found
    assert "mend NVIDIA apex: pip uninstall apex " in said


def test_a_version_that_was_not_tested(tmp_path: Path) -> None:
    folder = tmp_path / "megatron_core-0.12.3.dist-info"
    folder.mkdir()
    lines = ("Metadata-Version: 2.1", "Name: megatron-core", "Version: 0.12.3", "")
    (folder / "METADATA").write_text("\n".join(lines))
    code, said = examine(tmp_path, "megatron-core")
    assert code == 1
    assert "BROKEN 0.12.3 was not tested; tested are 0." in line(said, "megatron-core")
    assert "mend megatron-core: pip install 'megatron-core[training]" in said


BROKEN = {
    "crash": ("import os; os.abort()", "its import ends with -6"),
    "error": ("raise OSError('libcudart.so.13: no such file')", "OSError: libcudart.so.13: no suc"),
}


@pytest.mark.parametrize("code, sentence", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_import_stops_nothing(tmp_path: Path, code: str, sentence: str) -> None:
    package(tmp_path, "psutil", code)
    status, said = examine(tmp_path, "psutil", "numpy")
    assert status == 1 and f"psutil BROKEN {sentence}" in line(said, "psutil")
    assert "mend psutil: pip install psutil" in said
    assert "numpy ok" in line(said, "numpy")


def test_without_torch_and_rich(tmp_path: Path) -> None:
    """It still says what is missing, in plain text."""
    for name in ("torch", "rich"):
        package(tmp_path, name, f"raise ImportError('no {name}')")
    code, said = examine(tmp_path, "torch", "numpy")
    assert code == 1 and "torch BROKEN ImportError: no torch" in line(said, "torch")
    assert line(said, "numpy").startswith("numpy ok")


def test_what_is_needed_and_missing() -> None:
    needed = doctor.Check("it", "no_such_module_at_all", True, "", "pip install it")
    optional = doctor.Check("it", "no_such_module_at_all", False, "", "pip install it")
    assert doctor.examine(needed).state == "MISSING" and doctor.examine(needed).bad
    assert doctor.examine(optional).state == "absent" and not doctor.examine(optional).bad


def test_the_tested_range_is_the_requirement() -> None:
    """The line that mends Megatron is what this package asks for."""
    check = next(check for check in doctor.CHECKS if check.name == "megatron-core")
    text = (ROOT / "pyproject.toml").read_text()
    assert check.mend.removeprefix("pip install ").strip("'") in text
