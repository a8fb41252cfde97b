"""What a run's flags ask for, and the run that it becomes on hardware."""

import dataclasses
from dataclasses import dataclass

from megatron_dr.plan import choice
from megatron_dr.plan.activations import Kept
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.step import Run


@dataclass(frozen=True)
class Asked:
    """Of the command line.

    Attributes:
        batch, target_batch: sequences of a step over all ranks; a target batch of 0: no target.
        wanted: of the plugin; None: it is off.
        sample: tokens of a sample, where samples are packed; 0: one fills a sequence.
    """

    model: Model
    layout: Layout
    kept: Kept
    batch: int
    target_batch: int = 0
    wanted: Wanted | None = None
    sample: float = 0.0


def settle(asked: Asked, hardware: Hardware) -> tuple[Run, list[str]]:
    """The run, and what was chosen for it, in sentences.

    Raises:
        ValueError: batches or rows that the layout can't have.
    """
    layout, micro = asked.layout, asked.kept.shape.sequences
    targets = asked.wanted.rows.target_ranks if asked.wanted is not None else 0
    if targets >= layout.dp:
        raise ValueError(
            f"--dr-target-ranks {targets} must be below the data-parallel size {layout.dp}."
        )
    general = _share("--global-batch-size", asked.batch, micro, layout.dp - targets)
    target = _share("--dr-target-batch-size", asked.target_batch, micro, targets or layout.dp)
    plain = Run(asked.model, layout, asked.kept, general, target, None, asked.sample)
    if asked.wanted is None:
        return plain, []
    rows, said = choice.settle(asked.wanted, stages(asked.model, layout), hardware, general)
    if general % rows.slots:
        raise ValueError(
            f"{general} general microbatches per rank can't be divided into {rows.slots} slots: "
            "change --dr-slots, or --global-batch-size."
        )
    return dataclasses.replace(plain, rows=rows), said


def _share(flag: str, batch: int, micro: int, ranks: int) -> int:
    """Microbatches of a rank."""
    if batch % (micro * ranks):
        raise ValueError(
            f"{flag} {batch} is not a multiple of --micro-batch-size {micro} x {ranks} "
            "data-parallel ranks that run it: change one of them."
        )
    return batch // (micro * ranks)


def plain_of(run: Run) -> Run:
    """Megatron's own step on the general batch, on all ranks."""
    targets = run.rows.target_ranks if run.rows is not None else 0
    general = run.general * (run.layout.dp - targets) // run.layout.dp
    return dataclasses.replace(run, general=general, target=0, rows=None)
