"""All that is planned of a run, as plain numbers: what --json prints and the tables show."""

import dataclasses
from typing import Any

from megatron_dr.plan import fit, step, wire
from megatron_dr.plan.asked import plain_of
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.step import Run
from megatron_dr.plan.sweep import Proposal


def report(run: Run, hardware: Hardware, said: list[str]) -> dict[str, Any]:
    """Bytes, seconds and operations; plain Megatron's own step of the general batch beside it.

    Args:
        said: the sentences of what was chosen.
    """
    plain = plain_of(run)
    return {
        "layout": dataclasses.asdict(run.layout) | {"gpus": run.layout.world},
        "batch": {
            "micro_batch": run.kept.shape.sequences, "length": run.kept.shape.length,
            "general_microbatches": run.general, "target_microbatches": run.target,
        },
        "rows": None if run.rows is None else _rows(run),
        "memory": {
            "usable": hardware.usable,
            "stages": fit.needed(run),
            "most": fit.most(run),
            "plain": fit.most(plain),
        },
        "sent": {"plain": _sent(plain, hardware), "ours": _sent(run, hardware)},
        "operations": run.operations(),
        "seconds": {"plain": step.seconds(plain, hardware), "ours": step.seconds(run, hardware)},
        "largest_micro_batch": fit.largest_micro_batch(run, hardware),
        "chosen": said,
        "refusal": fit.refusal(run, hardware),
    }  # fmt: skip


def _rows(run: Run) -> dict[str, Any]:
    assert run.rows is not None
    counts = run.rows.of(run.layout)
    return {
        "rows": counts.rows, "ranks": run.rows.ranks, "slots": run.rows.slots,
        "target_ranks": run.rows.target_ranks, "gram": "exact" if run.rows.exact else "sketch",
    }  # fmt: skip


def _sent(run: Run, hardware: Hardware) -> dict[str, float]:
    """Bytes of gradients and parameters that a rank sends, of the stage that sends most."""
    held = stages(run.model, run.layout)
    each = [wire.plain(s) if run.rows is None else wire.ours(s, run.rows) for s in held]
    levels = [wire.by_level(sends, lambda rank: rank // hardware.node) for sends in each]
    inside, between = max(levels, key=sum)
    return {"in a node": inside, "between nodes": between}


def flags_of(run: Run) -> str:
    """Megatron's flags of a layout that --sweep proposes."""
    layout, recompute = run.layout, run.kept.recompute
    sizes = {
        "--tensor-model-parallel-size": layout.tp, "--pipeline-model-parallel-size": layout.pp,
        "--context-parallel-size": layout.cp, "--expert-model-parallel-size": layout.ep,
    }  # fmt: skip
    words = [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    words += ["--sequence-parallel"] if layout.sequence_parallel else []
    if layout.ep > 1:
        words.append(f"--expert-tensor-parallel-size {layout.etp}")
    words.append(f"--micro-batch-size {run.kept.shape.sequences}")
    if recompute.granularity != "none":
        words.append(f"--recompute-granularity {recompute.granularity}")
    if recompute.granularity == "full":
        words.append(f"--recompute-method uniform --recompute-num-layers {recompute.layers}")
    return " ".join(words)


def proposed(one: Proposal) -> dict[str, Any]:
    """A proposal of --sweep in numbers."""
    return {
        "flags": flags_of(one.run),
        "layout": dataclasses.asdict(one.run.layout),
        "seconds": one.seconds,
        "memory": one.memory,
    }
