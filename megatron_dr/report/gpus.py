"""Figures of a node's GPUs beside the metrics: memory, power, utilisation, clock, by NVML.

They are those of NVIDIA's `nvidia-ml-py` (module `pynvml`), which is optional: the extra `gpu`.
"""

import glob
import importlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.report.metrics import MetricsFile, note

GIB = 1 << 30
KIND = "gpus"
_MARK = ".gpus."
# name with unit, of NVML's module and a device
FIGURES: dict[str, Callable[[Any, Any], float]] = {
    "memory GiB": lambda nvml, gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB,
    "power W": lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
    "busy %": lambda nvml, gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
    "SM clock MHz": lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
}


def path_beside(metrics: str) -> Path:
    """Of this node: METRICS.gpus.HOST.jsonl, the ending of METRICS left out."""
    path = Path(metrics)
    return path.with_name(f"{path.stem}{_MARK}{socket.gethostname()}.jsonl")


def paths_beside(metrics: Path) -> dict[str, Path]:
    """By node, those that are there."""
    found = sorted(metrics.parent.glob(f"{glob.escape(metrics.stem)}{_MARK}*.jsonl"))
    return {path.stem.removeprefix(f"{metrics.stem}{_MARK}"): path for path in found}


def is_one(path: Path) -> bool:
    """Whether a file is of GPUs, and not a run's metrics."""
    return _MARK in path.name


class Gpus:
    """A line per call, of all GPUs that NVML shows on this node: {"kind": "gpus", "iteration": n,
    "<name> <number of the GPU>": value, ...}. What a GPU does not tell is left out.

    Args:
        metrics: the run's metrics file, beside which these lie.
    """

    def __init__(self, metrics: str) -> None:
        self._nvml: Any = None
        self._devices: list[Any] = []
        self._file: MetricsFile | None = None
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            count = range(self._nvml.nvmlDeviceGetCount())
            self._devices = [self._nvml.nvmlDeviceGetHandleByIndex(number) for number in count]
            self._file = MetricsFile(str(path_beside(metrics)))
        except ImportError:
            self._give_up("nvidia-ml-py is not installed (pip install 'megatron_dr[gpu]')")
        except Exception as error:  # no driver, no permission, no folder
            self._give_up(str(error))

    def write(self, iteration: int) -> None:
        if self._file is None:
            return
        try:
            self._file.write(KIND, iteration, self._read())
        except Exception as error:  # a GPU that is gone ends the run by itself, not by its figures
            self._give_up(str(error))

    def _read(self) -> dict[str, float]:
        nvml, found = self._nvml, {}
        for number, gpu in enumerate(self._devices):
            for name, figure in FIGURES.items():
                try:
                    found[f"{name} {number}"] = figure(nvml, gpu)
                except nvml.NVMLError_NotSupported:
                    continue
        return found

    def _give_up(self, why: str) -> None:
        self._file = None
        note(f"no figures of {socket.gethostname()}'s GPUs: {why}")
