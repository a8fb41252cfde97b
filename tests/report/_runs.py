"""Metrics of small runs, as a run writes them."""

import math
from pathlib import Path
from typing import Any

from megatron_dr.report.metrics import MetricsFile

BLOCKS = ["layer 0", "layer 1"]
ABOUT = {
    "flags": [["--lr", "1e-3"], ["--swiglu", ""]], "steps": 6, "ranks": 2, "device": "CPU",
    "versions": {"torch": "2.9"}, "layout": {"data": 2}, "git": {"commit": "c0ffee", "changed": 1},
    "machine": {"cores": 2, "memory bytes": 8e9}, "projection": {"set": "cone"},
}  # fmt: skip


def train(step: int, **more: Any) -> dict[str, Any]:
    return {
        "lm loss": 3.0 - 0.1 * step, "target loss": 4.0 / step, "dr cos general": 0.1,
        "dr cos update": 0.1 * step, "dr residual": 1.0, "dr rows": 2.0, "dr zero rows": 0.0,
        "dr alpha": 0.05, "dr beta": 0.25, "dr r": 0.4, "dr sketch error": 0.04,
        "dr sketch ms": 3.0, "dr solve ms": 1.0, "dr bytes": 16384.0, "learning rate": 1e-3,
        "step seconds": 0.5, "peak memory bytes": 2.0**30, **more,
    }  # fmt: skip


def write(
    path: Path, steps: int = 6, about: dict[str, Any] | None = None, blocks: list[str] = BLOCKS,
    ends: bool = True, only: tuple[str, ...] = (), **more: Any,
) -> Path:  # fmt: skip
    """A run's metrics, of training all or these only; NaN is among its blocks'."""
    file = MetricsFile(str(path))
    file.begin(0, {**ABOUT, "blocks": blocks, **(about or {})})
    for step in range(1, steps + 1):
        values = train(step, **more)
        file.write("train", step, {name: values[name] for name in only or values})
        cosines = [0.5, math.nan if step == 2 else -0.5 / step]
        file.write("blocks", step, {"dr cos update": cosines, "dr rows": [2.0, 1.5]})
        if step % 3 == 0:
            file.write("validation", step, {"lm loss": 3.5, "target loss": 2.5 - 0.1 * step,
                                            "validation seconds": 0.2})  # fmt: skip
    if ends:
        file.write("target test", steps, {"target test loss": 2.0})
        file.write("end", steps, {})
    return path
