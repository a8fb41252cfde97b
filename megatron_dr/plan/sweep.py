"""Layouts for a number of GPUs, by predicted step time."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_dr.plan import fit, step
from megatron_dr.plan.activations import Recompute
from megatron_dr.plan.asked import Asked, settle
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.step import Run

_STAGES, _CONTEXT = 16, 16  # most that are tried
_TIED = 1.005  # times the seconds of the fastest: as fast
_SEQUENCES = (1, 2, 4, 8)  # of a microbatch
_RECOMPUTES: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
_LEAST = 2048  # tokens of a microbatch on a rank: products of fewer run at a lower rate


@dataclass(frozen=True)
class Proposal:
    """A layout that fits. Seconds of a step, bytes of the rank that needs most."""

    run: Run
    seconds: float
    memory: float


def proposals(asked: Asked, gpus: int, hardware: Hardware) -> list[Proposal]:
    """All layouts that can be had and fit, the fastest first; of each the recompute and the
    microbatch that make it so. Of those within 0.5% of one another, which no plan tells
    apart, the one with the fewest context ranks is first, then pipeline stages, then tensor ranks.

    Raises:
        ValueError: no layout can be had: what the first lacks.
    """
    found: list[Proposal] = []
    refused: ValueError | None = None
    had = False
    for layout in layouts(asked.model, asked.layout, gpus, hardware.node):
        if not _long_enough(asked.kept.shape.length, layout.cp):
            continue
        try:
            fitting = _of_layout(dataclasses.replace(asked, layout=layout), hardware)
        except ValueError as error:
            refused = refused or error
            continue
        had = True
        if fitting:
            found.append(min(fitting, key=lambda one: one.seconds))
    if refused is not None and not had:
        raise refused
    return _in_order(found)


def _in_order(found: list[Proposal]) -> list[Proposal]:
    out: list[Proposal] = []
    left = sorted(found, key=lambda one: one.seconds)
    while left:
        tied = [one for one in left if one.seconds <= _TIED * left[0].seconds]
        out += sorted(tied, key=_split)
        left = left[len(tied) :]
    return out


def _split(one: Proposal) -> tuple[int, int, int]:
    layout = one.run.layout
    return layout.cp, layout.pp, layout.tp


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


def _long_enough(length: int, cp: int) -> bool:
    """What context ranks leave of a sequence to each."""
    return cp == 1 or (length % (2 * cp) == 0 and length // cp >= _LEAST)


def _of_layout(asked: Asked, hardware: Hardware) -> list[Proposal]:
    """The least recompute that fits, of each microbatch.

    Raises:
        ValueError: batches or rows that it can't have with any microbatch: of the first.
    """
    found: list[Proposal] = []
    refused: list[ValueError] = []
    for sequences in _SEQUENCES:
        try:
            found += _of_microbatch(asked, sequences, hardware)
        except ValueError as error:
            refused.append(error)
    if len(refused) == len(_SEQUENCES):
        raise refused[0]
    return found


def _of_microbatch(asked: Asked, sequences: int, hardware: Hardware) -> list[Proposal]:
    shape = dataclasses.replace(asked.kept.shape, sequences=sequences)
    for kind in _RECOMPUTES:
        if kind == "selective" and asked.kept.fused:
            continue  # flash attention keeps nothing that it would save
        kept = dataclasses.replace(asked.kept, shape=shape, recompute=Recompute(kind))
        run, _ = settle(dataclasses.replace(asked, kept=kept), hardware)
        memory = fit.most(run)
        if memory <= hardware.usable:
            return [Proposal(run, sum(step.seconds(run, hardware).values()), memory)]
    return []
