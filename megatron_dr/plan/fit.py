"""What a rank of each stage needs of its memory, whether it fits, and what would."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from megatron_dr.plan import activations, memory
from megatron_dr.plan.activations import Recompute
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.step import Run

GB = 1e9


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
    for flags, change in (*_changes(run), *_sharded(run)):
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
        flags = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        yield flags, lambda: _recomputed(run, full)
        if run.kept.shape.sequences > 1:
            one = with_micro_batch(run, 1)
            if one is not None:
                yield f"--micro-batch-size 1 {flags}", lambda: _recomputed(one, full)


def _sharded(run: Run) -> Iterator[tuple[str, Callable[[], Run | None]]]:
    """Twice, four times and eight times the tensor ranks, on as many GPUs."""
    layout = run.layout
    for tp in (2, 4, 8):
        more = tp // layout.tp
        if tp > layout.tp and tp % layout.tp == 0 and layout.dp % more == 0 and layout.ep == 1:
            other = dataclasses.replace(
                layout, tp=tp, etp=tp, dp=layout.dp // more, sequence_parallel=True
            )
            larger = dataclasses.replace(
                run, layout=other, general=run.general * more, target=run.target * more
            )
            yield (
                f"--tensor-model-parallel-size {tp} --sequence-parallel",
                functools.partial(lambda one: one, larger),
            )


def _laid_out(run: Run, **sizes: bool) -> Run:
    return dataclasses.replace(run, layout=dataclasses.replace(run.layout, **sizes))


def _recomputed(run: Run, recompute: Recompute) -> Run:
    return dataclasses.replace(run, kept=dataclasses.replace(run.kept, recompute=recompute))
