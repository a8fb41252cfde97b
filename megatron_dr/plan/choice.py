"""What --dr-rows, --dr-gram and --dr-row-ranks take by themselves, before a run:
`megatron_dr/mcore/buffer_rows/` (row_choice.py, row_groups.py, gram_choice.py) in numbers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_dr.plan import memory, reads, wire
from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.hardware import H100, Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows, ranks_near_a_node, ranks_that_belong_together
from megatron_dr.plan.wire import Send

_ENOUGH, _MOST = 8, 16  # rows


@dataclass(frozen=True)
class Wanted:
    """What the flags ask for.

    Attributes:
        auto: --dr-rows auto: ranks, or slots as well.
        weighs: the set tells rows apart.
        groups_ranks: the kind of rows has --dr-row-ranks.
        row_ranks: of a row; 0: near to a node.
        memory: --dr-memory.
        gram: `exact`, `sketch` or `auto`.
        sketch_size: K, of so many vectors.
        trained: elements that a rank of a layout trains, of adapters alone; None: all of them.
        rows: all else, as it is.
    """

    rows: Rows = Rows()
    auto: bool = True
    weighs: bool = True
    groups_ranks: bool = True
    row_ranks: int = 0
    memory: float = 0.1
    gram: str = "auto"
    sketch_size: Callable[[int], int] = lambda _: 4096
    trained: Callable[[Model, Layout], float] | None = None


def settle(
    wanted: Wanted, held: Sequence[Stage], hardware: Hardware, microbatches: int
) -> tuple[Rows, list[str]]:
    """The rows of a layout, and a sentence for each choice.

    Args:
        held: every stage of the layout.
        microbatches: general ones of a rank and step.

    Raises:
        ValueError: rows of so many ranks can't be had.
    """
    layout, said = held[0].layout, []
    ranks = ranks_that_belong_together(layout)
    if wanted.groups_ranks:
        ranks = wanted.row_ranks or ranks_near_a_node(layout, hardware.node)
    rows = dataclasses.replace(wanted.rows, ranks=ranks)
    groups = rows.of(layout).groups
    if wanted.auto:
        fit = min(_slots_that_fit(stage, rows, wanted, hardware) for stage in held)
        slots, why = choose(groups, microbatches, 1 + max(0, fit))
        slots = slots if wanted.weighs else 1
        rows = dataclasses.replace(rows, slots=slots)
        of_ranks = f"{groups} rows of {ranks} rank{'s'[: ranks > 1]}"
        of_ranks += f", {slots} slots on each" if slots > 1 else ""
        said.append(f"rows auto: {of_ranks} ({why})")
    rows = dataclasses.replace(rows, sketch=wanted.sketch_size(rows.of(layout).vectors))
    if wanted.gram == "auto":
        exact = max(_seconds(exposed(stage, rows, True, hardware.node)) for stage in held)
        sketch, made = max(
            (
                (_seconds(exposed(stage, rows, False, hardware.node)), _made(stage, rows))
                for stage in held
            ),
            key=sum,
        )
        rows = dataclasses.replace(rows, exact=exact <= sketch + made)
        kind = "exact" if rows.exact else "sketch"
        said.append(
            f"gram auto: {kind} (after the backward {exact * 1e3:,.3g} ms are sent with exact "
            f"rows, {sketch * 1e3:,.3g} ms with sketches, which take {made * 1e3:,.3g} ms to make)"
        )
    return rows, said


def _slots_that_fit(stage: Stage, rows: Rows, wanted: Wanted, hardware: Hardware) -> int:
    """Beside the first, in the share of what is free when the plugin is attached: Adam's moments
    are made at the first step."""
    elements: float = sum(b.numel for b in stage.buffers)
    stock, share = memory.plain(stage), 1.0
    if wanted.trained is not None:  # the buffers are the adapters'; all weights are there
        elements = wanted.trained(stage.model, stage.layout)
        share = elements / sum(b.filled for b in stage.buffers)
        stock["weights"] += stage.layout.weight_bytes * elements
    made = share * (stock["gradients"] + stock["optimizer"] - 8 * memory.owned(stage))
    free = hardware.usable - stock["weights"] - made
    target = elements * stage.layout.gradient_bytes
    return int((wanted.memory * free - target) // max(1, elements * rows.slot_bytes))


def exposed(stage: Stage, rows: Rows, exact: bool, node: int) -> tuple[float, float]:
    """Bytes in a node of so many GPUs and between nodes of what a rank sends when its backward is
    over."""
    sends = _late(stage, dataclasses.replace(rows, exact=exact))
    return wire.by_level(sends, lambda rank: rank // node)


def _seconds(levels: tuple[float, float]) -> float:
    """By an H100's bandwidths, whatever the hardware, as the run compares them."""
    return levels[0] / H100.inside.bandwidth + levels[1] / H100.between.bandwidth


def sketching(elements: float, local: int) -> float:
    """Seconds of an H100's memory to sketch so many local buffers of so many elements."""
    return reads.sketch_bytes(local) * elements / H100.memory_bandwidth


def _made(stage: Stage, rows: Rows) -> float:
    local = rows.slots + rows.of(stage.layout).targets
    return sketching(sum(b.numel for b in stage.buffers), local)


def _late(stage: Stage, rows: Rows) -> list[Send]:
    """With exact rows of the exchange all, or where it is overlapped the bucket that is ready last,
    of the last slot; with sketches Megatron's whole reduction."""
    layout = stage.layout
    if not rows.exact:
        reduced = [wire.reduction(layout, b, b.numel) for b in stage.buffers]
        return reduced + wire.grams(stage, rows)
    out = wire.gathered(stage) + wire.grams(stage, rows)
    if layout.overlap:
        last = {b.parameters[0].expert: (b, numel) for b, numel in stage.ready if b.chunk == 0}
        for buffer, numel in last.values():
            out += wire.general(layout, rows, buffer, numel, rows.slots - 1)
        return out
    for buffer in stage.buffers:
        for slot in range(rows.slots):
            out += wire.general(layout, rows, buffer, buffer.numel, slot)
        out += wire.target(layout, rows, buffer, buffer.numel)
    return out


def choose(groups: int, microbatches: int | None, fit: int) -> tuple[int, str]:
    """How many slots a rank has, and why.

    Args:
        groups: rows that ranks alone make.
        microbatches: general ones of a rank and step, which slots must divide; None: not known.
        fit: slots that memory allows.
    """
    if groups >= _ENOUGH:
        return 1, f"at least {_ENOUGH}"
    if microbatches is None:
        return (
            1,
            "how many microbatches a rank has is not known here: slots=n makes n times as many",
        )
    divisors = [n for n in range(1, microbatches + 1) if microbatches % n == 0]
    wanted = max(n for n in divisors if n == 1 or n * groups <= _MOST)
    slots = max(n for n in divisors if n <= min(wanted, fit))
    if slots < wanted:
        more = f"memory allows no more slots, where {wanted} would make {wanted * groups} rows"
        return slots, f"{more}: raise --dr-memory, or give --dr-slot-dtype bf16"
    if slots * groups < _ENOUGH:
        return slots, f"the {microbatches} microbatches of a rank make no more"
    return slots, f"up to {_MOST} rows"
