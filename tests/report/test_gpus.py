"""NVML is physically absent here: what stands in has its names and raises as it does."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dr.report import gpus, metrics


class NotSupported(Exception):
    pass


class Nvml:
    """Two GPUs of 5 and 6 GiB used; the second tells no power."""

    NVML_CLOCK_SM, NVMLError_NotSupported = 1, NotSupported

    def __init__(self, driver: bool = True) -> None:
        self.driver, self.gone = driver, False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise RuntimeError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        if self.gone:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(used=(5 + gpu) << 30)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        if gpu:
            raise NotSupported
        return 650_500

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return SimpleNamespace(gpu=97)

    def nvmlDeviceGetClockInfo(self, gpu: int, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return 1980


def test_each_gpus_figures_and_none_that_it_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    file = str(tmp_path / "runs" / "m.jsonl")
    node = gpus.Gpus(file)
    node.write(3)
    nvml.gone = True
    node.write(4)
    node.write(5)
    (line,) = metrics.read(gpus.path_beside(file), "gpus")
    assert line == {
        "kind": "gpus", "iteration": 3, "memory GiB 0": 5, "memory GiB 1": 6, "power W 0": 650.5,
        "busy % 0": 97, "busy % 1": 97, "SM clock MHz 0": 1980, "SM clock MHz 1": 1980,
    }  # fmt: skip
    assert capsys.readouterr().err.count("GPU is lost") == 1
    assert gpus.path_beside(file).parent == tmp_path / "runs"


@pytest.mark.parametrize("module, says", [(None, "not installed"), (Nvml(False), "Not Found")])
def test_without_it_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    module: Any, says: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    node = gpus.Gpus(str(tmp_path / "m.jsonl"))
    node.write(1)
    node.write(2)
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
