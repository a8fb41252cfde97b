"""What a training run is given: data of both roles, and a forward step."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.step.handle import Handle


class Source:
    """The seam between a training run and what it trains on; `TrainingRun` calls it in this order.

    Attributes:
        forward_step: of every step and validation; None: the training script's own.
        judged_by: what a validation says of the held-out target, and whether more of it is better.
        tests: whether `test` answers, and no streams are needed.
    """

    forward_step: Callable[..., Any] | None = None
    judged_by: tuple[str, bool] = ("target loss", False)
    tests = False

    def target_samples(self) -> Any:
        """The whole target set, of several a table by name; None without one. Before the plugin
        is attached.

        Raises:
            ValueError: no such data, or a wrong line; so below.
        """
        return None

    def distinct(self, samples: Any) -> int:
        """n of `--dr-alpha-style auto`: target samples that a whole run sees, each counted once."""
        return len(samples)

    def validation_samples(self) -> Any:
        """As `target_samples`, held out; None where `validate` needs no streams."""
        return None

    def test_samples(self) -> Any:
        """As `target_samples`, for the end of the run."""
        return None

    def streams(self, samples: Any, micro_batch_size: int, ranks: int, chunks: int) -> list[Any]:
        """This rank's microbatches of the samples, an iterator per model chunk.

        Args:
            samples: of one set of what `target_samples` or another gave.
            ranks: the first so many data-parallel ranks share them.
        """
        raise NotImplementedError

    def begin(self, handle: Handle) -> None:
        """The plugin is attached, and nothing was trained yet."""

    def datasets(self, num_samples: list[int], vp_stage: int | None) -> tuple[Any, Any, Any]:
        """General train, validation and test sets, for Megatron's loaders."""
        raise NotImplementedError

    def before_step(
        self, stock: Callable[..., Any], schedule: dict[str, Any], steps: int
    ) -> dict[str, Any]:
        """The arguments of a training step's schedule call, after so many steps.

        Args:
            stock: the schedule.
        """
        return schedule

    def logged(self, reports: Any) -> Any:
        """A training step's reports, as they are logged."""
        return reports

    def validate(self) -> Any:
        """The reports of a validation that calls no schedule; None: one of `streams`."""
        return None

    def test(self) -> Any:
        """As `validate`, of the target's test set alone, under the names of general data."""
        return None

    def save(self, iteration: int) -> None:
        """A checkpoint of this iteration is about to be written."""


def resumes(args: Namespace) -> bool:
    """Whether the run goes on from a checkpoint's iteration, rather than begins."""
    return bool(args.load) and args.iteration > 0


def new_folder(args: Namespace) -> Path | None:
    """--save, where what a run keeps beside its checkpoints is not there yet; else None."""
    if not args.save:
        return None
    folder = Path(args.save)
    return None if resumes(args) and Path(args.load).resolve() == folder.resolve() else folder


def target_microbatches(args: Namespace, dr: DRConfig, target: TargetConfig) -> dict[str, int]:
    """Target microbatches per step and rank that runs any, by set.

    Raises:
        ValueError: a set's batch can't be divided into them.
    """
    ranks: int = dr.target_ranks or args.data_parallel_size
    if dr.merges_target:
        (only,), general = target.target_sets, args.global_batch_size // args.micro_batch_size
        if only.batch % general:
            raise ValueError(
                f"--dr-target-batch-size {only.batch} is not a multiple of the {general} general "
                "microbatches of a step, as --dr-target-pass merged needs: change it."
            )
        return {only.name: general // ranks}
    together: int = args.micro_batch_size * ranks
    for one in target.target_sets:
        if one.batch % together:
            what = "--dr-target-ranks" if dr.target_ranks else "data-parallel size"
            said = f"{one.name}={one.batch}" if one.name else one.batch
            raise ValueError(
                f"--dr-target-batch-size {said} is not a multiple of --micro-batch-size x {what} "
                f"= {together}: change one of them."
            )
    return {one.name: one.batch // together for one in target.target_sets}
