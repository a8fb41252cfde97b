"""The frozen reference: a copy of the policy at the run's start, in the host's memory."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_dr.mcore import errors, unpickling
from megatron_dr.mcore.compat import unwrap
from megatron_dr.mcore.rollouts.state import evaluating

FOLDER = "dr_reference"


class Reference:
    """The trainable parameters' values at a time; frozen ones are the policy's own.

    Args:
        model: Megatron's list of model chunks, whose present values are kept.
    """

    def __init__(self, model: Sequence[torch.nn.Module]) -> None:
        self.model = list(model)
        self._parameters = [p for c in self.model for p in c.parameters() if p.requires_grad]
        with evaluating(self.model):
            self._values = self._copy()

    def _copy(self) -> list[torch.Tensor]:
        return [p.detach().to("cpu", copy=True) for p in self._parameters]

    def _put(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model is the reference inside, in evaluation mode; afterwards the policy again."""
        with evaluating(self.model):
            policy = self._copy()
            self._put(self._values)
            try:
                yield
            finally:
                self._put(policy)

    def save(self, folder: Path) -> None:
        """Write it to <folder>/dr_reference as a distributed checkpoint (collective).

        It is there whole or not at all; one that was there before is replaced.
        """
        final, partial = folder / FOLDER, folder / f"{FOLDER}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        with self.in_place():
            dist_checkpointing.save(self._sharded(), str(partial))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)

    def load(self, folder: Path) -> None:
        """Become the one that was saved there, in any layout (collective).

        Raises:
            ValueError: there is none, or its files are damaged.
        """
        path = folder / FOLDER
        if not path.is_dir():
            raise ValueError(
                f"{folder} has no {FOLDER}, so it is no checkpoint of a run with --dr-rl-kl above "
                "0: give --finetune to begin a new run from it, or --dr-rl-kl 0."
            )
        with errors.agreed():
            if dist.get_rank() == 0:
                unpickling.check(path)
        with self.in_place():
            found: dict[str, Any] = dist_checkpointing.load(self._sharded(), str(path))
            for number, chunk in enumerate(self.model):
                unwrap(chunk).load_state_dict(found[f"model{number}"], strict=False)
            self._values = self._copy()

    def _sharded(self) -> dict[str, Any]:
        return {
            f"model{number}": unwrap(chunk).sharded_state_dict()  # type: ignore[operator]
            for number, chunk in enumerate(self.model)
        }
