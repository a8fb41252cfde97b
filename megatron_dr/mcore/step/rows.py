"""What differs between rows in gradient buffers and rows inside layers: the handle's strategy."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_dr.mcore.compat import Schedule
from megatron_dr.mcore.step.alpha import Shares
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.mcore.step.schedule import Pass
from megatron_dr.mcore.step.sets import TargetSets

Passes = Generator[Pass, None, None]


@dataclass(frozen=True)
class Call:
    """A training step as the host asks for it, by the arguments of `Handle.step`.

    Attributes:
        step: steps done before.
        shares: alpha and beta of this step, from its gram where that decides them (`Alpha.shares`
            from there on).
        sets: of the target microbatches, where there are several.
    """

    function: Schedule
    schedule: dict[str, Any]
    target_data: Any
    num_target: int
    target_size: int
    domains: Sequence[int]
    step: int
    shares: Callable[..., Shares]
    sets: TargetSets | None = None

    @property
    def num_general(self) -> int:
        return int(self.schedule["num_microbatches"])

    @property
    def no_halves(self) -> str:
        """Why a rank's target microbatches make no two halves that are alike; empty where they do.
        Each set is in both halves with the same share, or they would not be of one target."""
        if self.sets is not None and not self.sets.halves_alike:
            return (
                f"a rank's {self.num_target} target microbatches make no two halves with as many "
                "of each target set (--dr-target-batch-size)"
            )
        if self.num_target % 2:
            return (
                f"a rank has {self.num_target} target microbatch(es), which are no two halves "
                "(--dr-target-batch-size)"
            )
        return ""


class Rows(Protocol):
    """A kind of rows on one model.

    Attributes:
        names: of the blocks that are projected, of the whole model.
        device: where the gradients are.
        hold: whether no gradient may be reduced before a schedule call's finalize.
    """

    names: tuple[str, ...]
    device: torch.device
    hold: bool

    def check_batch(self, num_general: int, num_target: int) -> None:
        """Raise ValueError where a step's microbatches can't make the rows."""

    def target_due(self, steps: int) -> bool:
        """Whether the next step, after so many, needs target microbatches."""

    def passes(self, call: Call, log: StepLog) -> Passes:
        """A step's schedule calls, each run before the next is asked for; the last one's finalize
        leaves the update in Megatron's buffers. On closing, all is as before the step."""

    @property
    def state(self) -> Any:
        """What later steps need of earlier ones, for a checkpoint."""

    def load(self, state: Any) -> None: ...

    def kept(self, steps: int) -> dict[str, Any]:
        """As `state`, after so many steps: what is large or spread over ranks, as Megatron's
        sharded tensors (collective)."""

    def load_kept(self, path: Path, samples: int, tokens: int) -> bool:
        """Whether what `dist_checkpointing` saved of it there could be taken (collective).

        Args:
            samples, tokens: of a general microbatch, and of one of its sequences.
        """

    def forget_target(self) -> None:
        """The last step's was not finite: the next one needs its own."""

    def offload(self) -> int:
        """Free what is kept on the device between steps; how many bytes."""

    def restore(self) -> None:
        """Take the memory again that the next step needs."""

    def close(self) -> None:
        """Take off what was put on the model."""
