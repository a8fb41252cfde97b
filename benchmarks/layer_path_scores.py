"""Scoring of single layers: time beside what the FLOPs say; a table of `layer_path.py`.

Processor time, so that other work on the machine is not in it; medians.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich import box
from rich.progress import track
from rich.table import Table

from megatron_dr.projection import flops, per_sample
from megatron_dr.projection.kronecker import Kronecker

SAMPLES, SKETCH = 16, 64
SHAPES = ((512, 512), (2048, 512), (128, 512), (4096, 512))  # O, I
LENGTHS = (16, 64, 256)
SCORES = ("sketched", "ghost", "exact")
Score = Callable[[], torch.Tensor]


def _runs(out: int, inner: int, tokens: int, gram: bool) -> dict[str, Score]:
    """Inner products of SAMPLES samples and a target gradient, or of it with them alone."""
    x_LNI, dy_LNO = torch.randn(tokens, SAMPLES, inner), torch.randn(tokens, SAMPLES, out)
    target_OI, pairs = torch.randn(out, inner), [(x_LNI, dy_LNO)]
    sides = Kronecker("layer", out, inner, SKETCH, SKETCH, 0)
    p_out, p_in = (sides.columns(side, None, "cpu", torch.float32) for side in ("out", "in"))
    target_K = per_sample.sketch([(torch.eye(inner)[:, None], target_OI.t()[:, None])], p_out, p_in)

    def dense(rows_NK: torch.Tensor, target_K: torch.Tensor) -> torch.Tensor:
        return rows_NK @ (torch.cat([rows_NK, target_K]).t() if gram else target_K.t())

    def ghost() -> torch.Tensor:
        cross_N = per_sample.ghost_cross(pairs, target_OI)
        return per_sample.ghost_gram(pairs) + cross_N if gram else cross_N

    return {
        "weight gradient": lambda: dy_LNO.flatten(0, 1).t() @ x_LNI.flatten(0, 1),
        "sketched": lambda: dense(per_sample.sketch(pairs, p_out, p_in), target_K),
        "ghost": ghost,
        "exact": lambda: dense(per_sample.gradients(x_LNI, dy_LNO, out).flatten(1),
                               target_OI.flatten()[None]),
    }  # fmt: skip


def measure(repetitions: int) -> list[dict[str, Any]]:
    """By layer: seconds and FLOPs of each score over the weight gradient's."""
    layers = [(*shape, tokens, gram) for shape in SHAPES for tokens in LENGTHS
              for gram in (False, True)]  # fmt: skip
    out = []
    for o, i, tokens, gram in track(layers, "scoring", transient=True):
        runs, times = _runs(o, i, tokens, gram), {}
        for run in runs.values():
            run()
        for _ in range(max(1, repetitions)):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times.setdefault(name, []).append(time.process_time() - start)
        seconds = {name: float(np.median(some)) for name, some in times.items()}
        work = flops.Work(o, i, SAMPLES, tokens, 0, SKETCH, SKETCH, gram)
        one = flops.weight_gradient(work)
        out.append({
            "out": o, "in": i, "tokens": tokens, "gram": gram,
            "weight gradient ms": 1e3 * seconds["weight gradient"],
            "measured": {s: seconds[s] / seconds["weight gradient"] for s in SCORES},
            "flops": {s: getattr(flops, s)(work) / one for s in SCORES},
            "auto": flops.cheapest(work),
        })  # fmt: skip
    return out


def preferred(measured: dict[str, float]) -> str:
    """What `auto` would take if it knew the seconds."""
    noiseless = min(measured["exact"], measured["ghost"])
    if noiseless > measured["sketched"] + flops._WORTH:
        return "sketched"
    return "exact" if measured["exact"] == noiseless else "ghost"


def table(layers: list[dict[str, Any]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    heads = ("O x I", "tokens", "products", "GEMM ms", *(f"{s}: time (FLOPs)" for s in SCORES),
             "auto", "by time")  # fmt: skip
    for head in heads:
        out.add_column(head, justify="right")
    for r in layers:
        pairs = [f"{r['measured'][s]:.2f} ({r['flops'][s]:.2f})" for s in SCORES]
        out.add_row(
            f"{r['out']} x {r['in']}", str(r["tokens"]), "rows" if r["gram"] else "target",
            f"{r['weight gradient ms']:.1f}", *pairs, r["auto"], preferred(r["measured"]),
        )  # fmt: skip
    return out
