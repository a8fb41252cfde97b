"""Layouts for a number of GPUs, by predicted step time."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_dr.plan import fit, step
from megatron_dr.plan.activations import Recompute
from megatron_dr.plan.asked import Asked, settle
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.step import Run

_STAGES, _CONTEXT = 16, 16  # most that are tried
_LEAST = 2048  # tokens of a microbatch on a rank: products of fewer run at a lower rate


@dataclass(frozen=True)
class Proposal:
    """A layout that fits. Seconds of a step, bytes of the rank that needs most."""

    run: Run
    seconds: float
    memory: float


def proposals(asked: Asked, gpus: int, hardware: Hardware) -> list[Proposal]:
    """All layouts that can be had and fit, the fastest first; of each the recompute and the
    microbatch that make it so."""
    found = []
    for layout in layouts(asked.model, asked.layout, gpus, hardware.node):
        best = min(
            _of_layout(dataclasses.replace(asked, layout=layout), hardware),
            key=lambda one: one.seconds, default=None,
        )  # fmt: skip
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda one: one.seconds)


def layouts(model: Model, like: Layout, gpus: int, node: int) -> Iterator[Layout]:
    """Tensor ranks inside a node, pipeline stages of equal layers, the rest context and data."""
    experts = [n for n in _divisors(model.experts, model.experts)] if model.experts else [1]
    for tp in _divisors(model.heads, node):
        for pp in _divisors(model.layers, _STAGES):
            for cp in (2**k for k in range(_CONTEXT.bit_length())):
                dp, rest = divmod(gpus, tp * pp * cp)
                if rest or not dp or (model.groups % tp and tp % model.groups) or tp & (tp - 1):
                    continue
                for ep in experts:
                    if (dp * cp * tp) % ep == 0 and (ep == 1 or dp % ep == 0):
                        yield dataclasses.replace(
                            like, tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, vpp=1,
                            etp=1 if ep > 1 else tp, sequence_parallel=tp > 1,
                        )  # fmt: skip


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _of_layout(asked: Asked, hardware: Hardware) -> Iterator[Proposal]:
    """The least recompute that fits, of each microbatch."""
    length = asked.kept.shape.length
    cp = asked.layout.cp
    if cp > 1 and (length % (2 * cp) or length // cp < _LEAST):
        return
    for sequences in (1, 2, 4, 8):
        shape = dataclasses.replace(asked.kept.shape, sequences=sequences)
        for kind in ("none", "selective", "full"):
            if kind == "selective" and asked.kept.fused:
                continue  # flash attention keeps nothing that it would save
            kept = dataclasses.replace(asked.kept, shape=shape, recompute=Recompute(kind))
            try:
                run, _ = settle(dataclasses.replace(asked, kept=kept), hardware)
            except ValueError:  # batches that can't be had
                break
            memory = fit.most(run)
            if memory <= hardware.usable:
                yield Proposal(run, sum(step.seconds(run, hardware).values()), memory)
                break
