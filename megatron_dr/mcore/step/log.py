"""A step's values for the log, of every kind of rows, by their names there."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, compat, constants, say
from megatron_dr.mcore.step.bad import Bad
from megatron_dr.projection import Update, report, report_sums

_ROWS = {"effective_rows": "dr rows", "zero_rows": "dr zero rows"}
_PRODUCTS = {
    "cos_general": "dr cos general", "cos_update": "dr cos update", "residual": "dr residual",
}  # fmt: skip


class Window(NamedTuple):
    """Rows that were weighed together, by blocks."""

    blocks: Sequence[int]
    update: Update
    row_M: torch.Tensor


class StepLog:
    """What was projected in one step.

    Args:
        names: of the blocks that are projected.
        keeps: whether `windows` are kept.

    Attributes:
        projects: whether there was something to project on.
        windows: what was projected, with who the rows are, of those that this rank speaks for.
        width: with sample rows, the places of a microbatch: sample j of microbatch m of data rank r
            of D has the number (m D + r) width + j, in every layout the same.
        bad: what was not finite.
        name_bad: name it now, where Megatron's own check may end the step (collective).
    """

    def __init__(self, names: tuple[str, ...], device: torch.device, keeps: bool = False) -> None:
        self.names, self.device, self.keeps, self.width = names, device, keeps, 0
        self.windows: list[Window] = []
        self._updates: list[tuple[Sequence[int], Update]] = []
        self._values: dict[str, torch.Tensor | float] = {}
        self._names = _PRODUCTS | _ROWS
        self.projects = False
        self.bad: Bad | None = None
        self.name_bad: Callable[[], None] = lambda: None

    def put(self, name: str, value: torch.Tensor | float) -> None:
        """A value of the step."""
        self._values[name] = value

    def add(
        self, update: Update, blocks: Sequence[int], row_M: torch.Tensor | None = None
    ) -> None:  # fmt: skip
        """An update of the blocks of these numbers; of ranks that have the same, one adds it.

        Args:
            row_M: the rows' numbers, int64, [B, M] where blocks have their own; None: another rank
                keeps them.
        """
        self._updates.append((blocks, update))
        self.projects = True
        if self.keeps and row_M is not None:
            self.windows.append(Window(blocks, update, row_M))

    def sum_over_ranks(self, products: bool, sums: torch.Tensor) -> None:
        """Where each rank has windows or blocks of its own, at the step's end (collective).

        Args:
            products: whether the grams hold the rows' products; without them there are no cosines.
            sums: more to sum, in place.
        """
        self.projects = True
        for group in (compat.model_group(), compat.data_group()):
            collectives.all_reduce(self._sums_B9, group)
            collectives.all_reduce(sums, group)
        if not products:
            self._names = _ROWS

    @property
    def spoilt(self) -> torch.Tensor:
        """Whether any sum is not finite."""
        return ~self._sums_B9.isfinite().all()

    @property
    def finite(self) -> bool:
        """Whether all sums are; reads the device."""
        return not bool(self.spoilt)

    def metrics(self) -> dict[str, torch.Tensor]:
        """Scalars of the whole model."""
        values = self._values
        if self.projects:
            found = report(self._sums_B9.sum(0))
            values = {**{name: found[key] for key, name in self._names.items()}, **values}
        return {name: self._on_device(v) for name, v in values.items()}

    def _on_device(self, value: torch.Tensor | float) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.to(self.device)
        return constants.scalar(value, self.device)

    def blocks(self) -> dict[str, list[float]]:
        """Each value of every block, in the order of `names`; reads the device."""
        found = report(self._sums_B9)
        return {name: found[key].tolist() for key, name in self._names.items()}

    @functools.cached_property
    def _sums_B9(self) -> torch.Tensor:
        """[B, 9] of what was added here; grams of one shape at once."""
        sums_B9 = torch.zeros(len(self.names), 9, dtype=torch.float64, device=self.device)
        by_shape: dict[torch.Size, list[tuple[Sequence[int], Update]]] = {}
        for blocks, update in self._updates:
            by_shape.setdefault(update.gram_BRR.shape[1:], []).append((blocks, update))
        for alike in by_shape.values():
            tensors = [(u.gram_BRR, u.direction_BR, u.update_BR) for _, u in alike]
            found_B9 = report_sums(*(torch.cat(parts) for parts in zip(*tensors, strict=True)))
            numbers = [number for blocks, _ in alike for number in blocks]
            sums_B9.index_add_(0, constants.index(numbers, self.device), found_B9)
        self._updates.clear()
        return sums_B9


def write_blocks(log: StepLog, iteration: int, args: Any, writer: Any, wandb: Any) -> None:
    """Each block's values: to TensorBoard and W&B where Megatron writes there, and as lines of the
    log.

    Args:
        writer, wandb: TensorBoard's and W&B's, on the rank that has them.
    """
    to_board = writer is not None and iteration % args.tensorboard_log_interval == 0
    last = dist.get_rank() == dist.get_world_size() - 1  # where Megatron logs
    to_log = last and iteration % args.log_interval == 0
    if not log.projects or not (to_board or to_log):
        return
    values = log.blocks()
    for number, block in enumerate(log.names):
        if to_board:
            for name, of_blocks in values.items():
                writer.add_scalar(f"{name}/{block}", of_blocks[number], iteration)
        if to_board and wandb is not None:
            found = {f"{name}/{block}": of_blocks[number] for name, of_blocks in values.items()}
            wandb.log(found, iteration)
        if to_log:
            numbers = " | ".join(f"{n}: {v[number]: .3f}" for n, v in values.items())
            say.log(f" iteration {iteration} | {block} | {numbers}")
