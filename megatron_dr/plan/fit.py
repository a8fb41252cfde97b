"""What a rank of each stage needs of its memory, whether it fits, and what would."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from megatron_dr.plan import activations, memory
from megatron_dr.plan.activations import Recompute
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.rows import ranks_near_a_node
from megatron_dr.plan.step import Run

GB = 1e9
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
_MORE = (1, 2, 4, 8, 16)  # times as many tensor ranks, or pipeline stages
_STAGES = 16  # most that are tried


def needed(run: Run) -> list[dict[str, float]]:
    """Bytes by part, of a rank of each stage."""
    out = []
    for stage in stages(run.model, run.layout):
        parts = memory.plain(stage)
        kept = activations.of_stage(stage, run.kept, run.microbatches)
        parts["activations"] = sum(kept.values())
        if run.rows is not None:
            parts |= memory.ours(stage, run.rows)
        out.append(parts)
    return out


def most(run: Run) -> float:
    """Bytes of the stage that needs most."""
    return max(sum(parts.values()) for parts in needed(run))


def with_micro_batch(run: Run, sequences: int) -> Run | None:
    """The same batches in microbatches of so many sequences; None where they can't be had."""
    shape = run.kept.shape
    general, target = run.general * shape.sequences, run.target * shape.sequences
    slots = run.rows.slots if run.rows is not None else 1
    if general % sequences or target % sequences or general // sequences % slots:
        return None
    kept = dataclasses.replace(run.kept, shape=dataclasses.replace(shape, sequences=sequences))
    return dataclasses.replace(
        run, kept=kept, general=general // sequences, target=target // sequences
    )


def largest_micro_batch(run: Run, hardware: Hardware) -> int:
    """Sequences of the largest microbatch that divides the batches and fits; 0: none does."""
    found = 0
    for sequences in range(1, run.general * run.kept.shape.sequences + 1):
        other = with_micro_batch(run, sequences)
        if other is not None and most(other) <= hardware.usable:
            found = sequences
    return found


def refusal(run: Run, hardware: Hardware) -> str:
    """One sentence where the run does not fit: what takes how much, and the first change that
    would do; empty where it fits."""
    each = needed(run)
    totals = [sum(parts.values()) for parts in each]
    number = totals.index(max(totals))
    if totals[number] <= hardware.usable:
        return ""
    parts = sorted(each[number].items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts if size > 0.01 * GB)
    what = f"stage {number} needs" if len(totals) > 1 else "a rank needs"
    return (
        f"It does not fit: {what} {totals[number] / GB:.1f} GB of {hardware.usable / GB:.1f} "
        f"({shown}); {_mended(run, hardware)}."
    )


def _mended(run: Run, hardware: Hardware) -> str:
    for flags, change in (*_changes(run), *_sharded(run, hardware)):
        try:
            other = change()
            if other is not None and most(other) <= hardware.usable:
                return f"{flags} would need {most(other) / GB:.1f} GB"
        except ValueError:  # a layout that can't be had
            continue
    return "take more GPUs for a copy of the model: --sweep proposes layouts"


def _changes(run: Run) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """From the cheapest on."""
    selective, full = Recompute("selective"), Recompute("full")
    if run.rows is not None and run.rows.slots > 1:
        rows = run.rows
        yield (
            "--dr-rows rank",
            lambda: dataclasses.replace(run, rows=dataclasses.replace(rows, slots=1)),
        )
    if not run.layout.distributed_optimizer and run.layout.data > 1:
        yield "--use-distributed-optimizer", lambda: _laid_out(run, distributed_optimizer=True)
    if run.layout.tp > 1 and not run.layout.sequence_parallel:
        yield "--sequence-parallel", lambda: _laid_out(run, sequence_parallel=True)
    if run.kept.shape.sequences > 1:
        yield "--micro-batch-size 1", lambda: with_micro_batch(run, 1)
    if run.kept.recompute.granularity == "none":
        yield "--recompute-granularity selective", lambda: _recomputed(run, selective)
    if run.kept.recompute.granularity != "full":
        yield _FULL, lambda: _recomputed(run, full)
        if run.kept.shape.sequences > 1:
            one = with_micro_batch(run, 1)
            if one is not None:
                yield f"--micro-batch-size 1 {_FULL}", lambda: _recomputed(one, full)


def _sharded(run: Run, hardware: Hardware) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """More tensor ranks and pipeline stages on as many GPUs, the fewest of both first; then the
    same with all layers recomputed."""
    layout, full = run.layout, Recompute("full")
    ranks = max(hardware.node, layout.tp)
    stages_ = layout.pp if layout.vpp > 1 else _STAGES  # a flag may count a chunk's layers
    sizes = [
        (tp, pp) for tp in _MORE for pp in _MORE
        if tp * pp > 1 and tp * layout.tp <= ranks and (pp == 1 or pp * layout.pp <= stages_)
    ]  # fmt: skip
    for recompute in dict.fromkeys((run.kept.recompute, full)):
        for tp, pp in sorted(sizes, key=lambda size: (size[0] * size[1], size[1])):
            flags = _flags(layout, tp, pp) + f" {_FULL}" * (recompute is full)
            other = _recomputed(run, recompute)
            yield flags, functools.partial(_split, other, tp, pp, hardware.node)


def _flags(layout: Layout, tp: int, pp: int) -> str:
    words = [f"--tensor-model-parallel-size {layout.tp * tp} --sequence-parallel"] * (tp > 1)
    words += [f"--pipeline-model-parallel-size {layout.pp * pp}"] * (pp > 1)
    return " ".join(words)


def _split(run: Run, tp: int, pp: int, node: int) -> Run | None:
    """With so many times the tensor ranks and pipeline stages of equal layers, the batches on the
    data-parallel ranks that are left; None where it can't be had."""
    layout, model, rows = run.layout, run.model, run.rows
    targets = rows.target_ranks if rows is not None else 0
    dp, rest = divmod(layout.dp, tp * pp)
    wide = layout.tp * tp
    if rest or dp <= targets or model.layers % (layout.pp * pp * layout.vpp):
        return None
    uneven = model.heads % wide or (model.groups % wide and wide % model.groups)
    if tp > 1 and (layout.ep > 1 or uneven):
        return None
    general, left = divmod(run.general * (layout.dp - targets), dp - targets)
    target, over = divmod(run.target * (targets or layout.dp), targets or dp)
    if left or over or (rows is not None and general % rows.slots):
        return None
    other = dataclasses.replace(layout, dp=dp, pp=layout.pp * pp)
    if tp > 1:
        other = dataclasses.replace(other, tp=wide, etp=wide, sequence_parallel=True)
    if rows is not None and rows.ranks == ranks_near_a_node(layout, node):  # not of a flag
        rows = dataclasses.replace(rows, ranks=ranks_near_a_node(other, node))
    return dataclasses.replace(run, layout=other, general=general, target=target, rows=rows)


def _laid_out(run: Run, **sizes: bool) -> Run:
    return dataclasses.replace(run, layout=dataclasses.replace(run.layout, **sizes))


def _recomputed(run: Run, recompute: Recompute) -> Run:
    return dataclasses.replace(run, kept=dataclasses.replace(run.kept, recompute=recompute))
