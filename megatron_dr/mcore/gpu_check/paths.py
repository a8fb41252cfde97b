"""Steps of both paths against the oracle, and the same bits on repeat.

The oracle's rows are gradients by autograd of one row after the other, on the same model and
device, read to the CPU. What both have in common is Megatron's forward and backward; what is
compared is all that the plugin does with it.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.gpu_check import oracle
from megatron_dr.mcore.gpu_check.found import FAILED, MEASURED, OK, Found, Where, failed, within
from megatron_dr.mcore.gpu_check.model import CHECK, SMALL, Batch, Model
from megatron_dr.mcore.gpu_check.oracle import Gradient
from megatron_dr.mcore.gpu_check.start import lacks, start

# |found - expected| / |expected| of a parameter. Rows by autograd are rounded to the dtype before
# they are multiplied and summed; the layer path rounds a weighted sum once. fp8: as bf16, since
# both have the same quantised factors.
LIMITS = {"fp32": 1e-4, "bf16": 3e-2, "fp8": 3e-2}
STEPS = 2  # Megatron overlaps its reduction from the second on
_LAYERS = (("local", "fp32"), ("local", "bf16"), ("te", "bf16"), ("te", "fp8"))
BUFFERS = {
    "exact gram": DRConfig(slots=4, gram="exact", alpha=0.1),
    "sketched gram": DRConfig(slots=4, gram="sketch", sketch_size=4096, alpha=0.1),
}
SAMPLES = {
    "topk, sketched": DRConfig(rows="sample", set="topk", fraction=0.5, norm="tokens", alpha=0.1,
                               blocks="matrix", score="sketched", kronecker_out=32,
                               kronecker_in=32),
    "topk, ghost": DRConfig(rows="sample", set="topk", fraction=0.5, norm="tokens", alpha=0.1,
                            blocks="matrix", score="ghost"),
    "cone, ghost": DRConfig(rows="sample", alpha=0.1, blocks="matrix", score="ghost"),
    "cone of the model, 1 pass": DRConfig(rows="sample", alpha=0.1, score="exact"),
    "cone of the model, 2 passes": DRConfig(rows="sample", alpha=0.1, score="exact", passes=2),
}  # fmt: skip


class Expected(NamedTuple):
    """A step's gradient, and the parameters that can't be compared."""

    gradient: Gradient
    near: set[str]


# -- parts -----------------------------------------------------------------------------------------
def buffers(where: Where) -> Iterator[Found]:
    """Rows in gradient buffers, on each kind of layers and dtype."""
    yield from _cases(where, _LAYERS, BUFFERS, of_slots)


def layers(where: Where) -> Iterator[Found]:
    """Sample rows, on each kind of layers that takes them."""
    yield from _cases(where, _LAYERS[:3], SAMPLES, of_samples)


def repeat(where: Where) -> Iterator[Found]:
    """Whether a step gives the same bits twice: with torch's deterministic algorithms it must,
    where plain Megatron does; without them it is told."""
    start(where.device)
    arms = {"plain Megatron": None, **BUFFERS, **SAMPLES}
    for strict in (True, False) if where.cuda else (True,):
        with _deterministic(strict):
            model = Model(SMALL if where.small else CHECK, where.device, "local", "bf16")
            plain = True
            for name, dr in arms.items():
                same = _twice(model, dr)
                plain = same if dr is None else plain
                state = MEASURED if not strict or not plain else (OK if same else FAILED)
                how = "deterministic algorithms" if strict else "as it comes"
                yield Found(f"{how}: {name}", state, {"same bits": "yes" if same else "no"})
        del model


# -- steps -----------------------------------------------------------------------------------------
def _cases(
    where: Where, kinds: Sequence[tuple[str, str]], cases: dict[str, DRConfig],
    expect: Callable[[Model, DRConfig, int, list[Batch], list[Batch]], Expected],
) -> Iterator[Found]:  # fmt: skip
    start(where.device)
    for kind, dtype in kinds:
        missing, model = lacks(kind, dtype, where.device), None
        for name, dr in cases.items():
            name = f"{kind} {dtype}: {name}"
            if missing:
                yield Found(name, missing)
                continue
            try:
                if model is None:
                    model = Model(SMALL if where.small else CHECK, where.device, kind, dtype)
                    yield _control(f"{kind} {dtype}: plain Megatron", model, dtype)
                yield _compare(name, model, dr, LIMITS[dtype], expect)
            except Exception as error:  # whatever it is, the next case goes on
                yield failed(name, error)
        del model
        gc.collect()


def _control(name: str, model: Model, dtype: str) -> Found:
    """Plain Megatron's gradient is the rows' mean: how far kernels alone are from the oracle."""
    general = model.batches(1, model.sizes.general)
    rows = [mean_loss(model, [batch]) for batch in general]
    mean = {n: torch.stack([row[n] for row in rows]).mean(0) for n in rows[0]}
    model.gradients(general)
    error, at = oracle.difference(model.read(), mean, set())
    return within(name, error, LIMITS[dtype], at)


def _compare(
    name: str, model: Model, dr: DRConfig, limit: float,
    expect: Callable[[Model, DRConfig, int, list[Batch], list[Batch]], Expected],
) -> Found:  # fmt: skip
    """The worst of some steps of training."""
    model.attach(dr)
    assert model.handle is not None
    worst, left, compared = (0.0, ""), 0, 0
    try:
        for step in range(STEPS):
            # of samples, each microbatch is a window of its own: two say as much as four
            number = 2 if dr.row_kind.in_layers else model.sizes.general
            general = model.batches(10 + step, number)
            target = model.batches(20 + step, model.sizes.target)
            wanted = expect(model, model.handle.dr, step, general, target)
            model.gradients(general, target)
            worst = max(worst, oracle.difference(model.read(), *wanted), key=_badness)
            left, compared = left + len(wanted.near), compared + len(wanted.gradient)
            model.optimizer.step()
    finally:
        model.attach(None)
    found = within(name, worst[0], limit, worst[1])
    if 2 * left > compared:
        return Found(name, FAILED, found.figures, f"{left} of {compared} choices are too near")
    return Found(name, found.state, {**found.figures, "left out": left}, found.said)


def _badness(error: tuple[float, str]) -> float:
    return error[0] if error[0] == error[0] else float("inf")


def mean_loss(model: Model, batches: Sequence[Batch]) -> Gradient:
    """The gradient of the mean over microbatches of their mean token loss."""
    parts = [(b, b["loss_mask"] / b["loss_mask"].sum() / len(batches)) for b in batches]
    return model.alone(parts)


def of_slots(
    model: Model, dr: DRConfig, step: int, general: list[Batch], target: list[Batch]
) -> Expected:
    """A row is a slot's microbatches."""
    each = len(general) // dr.num_slots
    groups = [general[n : n + each] for n in range(0, len(general), each)]
    rows = [mean_loss(model, group) for group in groups]
    seen = oracle.exact if dr.gram == "exact" else oracle.hashed(dr, step)
    share = torch.full((len(rows),), 1.0 / len(rows), dtype=torch.float64)
    return Expected(*oracle.update(dr, rows, mean_loss(model, target), seen, share))


def of_samples(
    model: Model, dr: DRConfig, _: int, general: list[Batch], target: list[Batch]
) -> Expected:
    """A row is a sample, and those of a microbatch compete. Row i is M U_i / T, U_i the gradient of
    its summed token losses and T the microbatch's tokens."""
    t = mean_loss(model, target)
    seen = oracle.by_sides(dr) if dr.score == "sketched" else oracle.exact
    total, near = {name: torch.zeros_like(value) for name, value in t.items()}, set()
    for batch in general:
        mask = batch["loss_mask"]
        samples, tokens = len(mask), mask.sum()
        rows = []
        for n in range(samples):
            one = {name: value[n : n + 1] for name, value in batch.items()}
            rows.append(model.alone([(one, samples * one["loss_mask"] / tokens)]))
        share_M = (mask.sum(1) / tokens).cpu().double()
        part, close = oracle.update(dr, rows, t, seen, share_M)
        near |= close
        for name, value in part.items():
            total[name] += value / len(general)
    return Expected(total, near)


def _twice(model: Model, dr: DRConfig | None) -> bool:
    """Whether two steps from the same state leave the same bits; one before them is for what is
    counted in the first step."""
    model.attach(dr)
    general, target = (model.batches(n, m) for n, m in ((1, model.sizes.general), (2, 2)))
    found: list[Tensor] = []
    for _ in range(3):
        if model.handle is not None:
            model.handle.steps = 0  # which seeds the sketches
        model.gradients(general, target)
        found.append(torch.cat([b.grad_data for b in model.chunks[0].buffers]).clone())
    model.attach(None)
    return bool(torch.equal(found[1], found[2]))


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms; what has none is told by the bits."""
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
