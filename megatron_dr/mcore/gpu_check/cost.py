"""Time and memory of a step beside plain Megatron's in the same run.

One model and one optimizer: the arms take turns, each attached anew, so that what all of them hold
is held once. A turn is two steps that are not looked at (the first makes what is made once and
counts buckets, so that the second is the first to overlap) and then the timed ones, with the device
waited for before and after. Peak memory is that of a turn's timed steps.
"""

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.gpu_check.found import MEASURED, Found, Where, failed
from megatron_dr.mcore.gpu_check.model import LARGE, SMALL, Batch, Model
from megatron_dr.mcore.gpu_check.parts import GIB, copy_rate, wait
from megatron_dr.mcore.gpu_check.start import lacks, start

_WARM, _TIMED, _TURNS = 2, 2, 3
_PLAIN, _AS_MANY = "plain Megatron", "plain, as many microbatches"
ARMS: dict[str, DRConfig | None] = {
    _PLAIN: None,
    _AS_MANY: None,
    "off: mean, no target": DRConfig(set="mean"),
    "cone, 4 slots, exact": DRConfig(slots=4, gram="exact"),
    "cone, 4 slots, sketch": DRConfig(slots=4, gram="sketch"),
    "topk of samples, sketched": DRConfig(rows="sample", set="topk", fraction=0.5, norm="tokens",
                                          blocks="matrix", score="sketched"),
    "cone of samples, ghost": DRConfig(rows="sample", blocks="matrix", score="ghost"),
}  # fmt: skip


@dataclass
class Arm:
    """What was measured: milliseconds of each timed step, by turn; peak bytes; the parts' own
    milliseconds, as the log has them, of a step's end."""

    step_ms: list[list[float]] = field(default_factory=list)
    peak: int = 0
    laps_ms: dict[str, float] = field(default_factory=dict)
    buffers: int = 0


def step(where: Where) -> Iterator[Found]:
    """Every arm's time and memory; after each turn of all arms what is known by then."""
    start(where.device)
    kind = "local" if lacks("te", "bf16", where.device) else "te"
    model = Model(SMALL if where.small else LARGE, where.device, kind, "bf16")
    rate = copy_rate(where)
    yield Found("model", MEASURED, {
        "parameters": model.parameters, "sequence": model.sizes.sequence, "layers": kind,
        "copied GiB/s": rate / GIB,
    })  # fmt: skip
    general = model.batches(1, model.sizes.general + model.sizes.target)
    target = model.batches(2, model.sizes.target)
    measured, broken = {name: Arm() for name in ARMS}, set[str]()
    for turn in range(1 if where.small else _TURNS):
        order = list(ARMS)
        random.Random(turn).shuffle(order)
        for name in order:
            if name in broken:
                continue
            try:
                _turn(model, name, measured[name], (general, target), where)
            except Exception as error:  # out of memory is one
                broken.add(name)
                yield failed(name, error)
            finally:
                model.attach(None)
        yield from (_said(n, arm, measured, rate) for n, arm in measured.items() if arm.step_ms)


def _turn(
    model: Model, name: str, arm: Arm, batches: tuple[list[Batch], list[Batch]], where: Where
) -> None:
    general, target = batches
    dr = ARMS[name]
    if name != _AS_MANY:
        general = general[: model.sizes.general]
    if name.startswith("off"):
        target = []
    model.attach(dr)
    arm.step_ms.append([])
    for number in range(_WARM + _TIMED):
        wait(where)
        if where.cuda and number == _WARM:
            torch.cuda.reset_peak_memory_stats(where.device)
        before = time.perf_counter()
        model.gradients(general, target)
        model.optimizer.step()
        wait(where)
        if number >= _WARM:
            arm.step_ms[-1].append(1e3 * (time.perf_counter() - before))
    if where.cuda:
        arm.peak = max(arm.peak, torch.cuda.max_memory_allocated(where.device))
    if model.handle is None or dr is None:
        return
    if not dr.row_kind.in_layers:
        arm.buffers = model.gradient_bytes * (dr.num_slots + 1)
    for key, value in model.handle.metrics.items():
        if key.endswith(" ms"):
            lap = key.removeprefix("dr ").removesuffix(" ms")
            arm.laps_ms[lap] = min(arm.laps_ms.get(lap, float("inf")), float(value))


def _said(name: str, arm: Arm, measured: dict[str, Arm], rate: float) -> Found:
    """Ratios are medians over the turns of the ratio within each."""
    ms = [statistics.median(turn) for turn in arm.step_ms]
    figures: dict[str, float | str] = {"step ms": statistics.median(ms)}
    for label, other in (("/ plain", _PLAIN), ("/ as many", _AS_MANY)):
        of_other = [statistics.median(turn) for turn in measured[other].step_ms]
        pairs = zip(ms, of_other, strict=False)  # an arm may have failed in its second turn
        figures[label] = statistics.median([a / b for a, b in pairs] or [float("nan")])
    if arm.peak:
        figures["peak GiB"] = arm.peak / GIB
        figures["peak / plain"] = arm.peak / (measured[_PLAIN].peak or float("nan"))
    for lap, milliseconds in arm.laps_ms.items():
        figures[f"{lap} ms"] = milliseconds
        if arm.buffers and lap != "solve":
            figures[f"{lap} / copy"] = milliseconds / (1e3 * arm.buffers / rate)
    return Found(name, MEASURED, figures)
