"""The target's features, where its samples have microbatches of their own."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_dr.mcore import collectives, meter
from megatron_dr.mcore.layer_rows import saved_target, scoring
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.layer_rows.scoring import Use


class Targets:
    """Sums over all target samples, per parameter: features [K], or the gradient for `ghost`.

    Args:
        places: of this rank's parameters.

    Attributes:
        wanted: whether this pass gathers them.
        known: whether there is a target, of this step or an earlier one; the same on every rank,
            also where a rank has no parameters and keeps nothing.
    """

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self._places = places
        self._value: dict[int, torch.Tensor] = {}
        self._difference: dict[int, torch.Tensor] = {}
        self._signs: Sequence[float] = ()
        self.wanted, self.known, self._to_mean = False, False, 1.0

    def begin(self, wanted: bool, to_mean: float, signs: Sequence[float] = ()) -> None:
        """Start a pass; where its target is not gathered, the last one stays (a cache).

        Args:
            to_mean: makes the sum over all ranks the target's mean gradient.
            signs: of its microbatches' halves, where their difference is gathered, too.
        """
        self.wanted, self._to_mean, self._signs = wanted, to_mean, signs
        if wanted:
            self.known = True
            self._value.clear()
            self._difference.clear()

    def add(self, place: Place, uses: list[Use], microbatch: int) -> None:
        part = scoring.target_part(place, uses)
        if self._signs:
            signed = self._signs[microbatch] * part
            self._difference[place.number] = self._difference.get(place.number, 0.0) + signed
        known = self._value.get(place.number)
        self._value[place.number] = part if known is None else known.add_(part)

    def sharded(self, seed: int) -> dict[str, ShardedTensor]:
        """For a checkpoint (collective)."""
        return saved_target.sharded(self._places, self._value, seed)

    def load(self, path: Path, seed: int) -> bool:
        """Whether what was saved there could be taken (collective)."""
        found = saved_target.load(self._places, path, seed)
        self._value, self.known = found or {}, found is not None
        return self.known

    def offload(self, keep: bool) -> int:
        """Off the device, to the host's memory or nowhere; bytes that are free then."""
        values = list(self._value.values())
        if not keep:
            self.known = False
            self._value.clear()
            return sum(value.nbytes for value in values)
        self.move(torch.device("cpu"))
        return sum(value.nbytes for value in values if value.device.type != "cpu")

    def move(self, device: torch.device) -> None:
        self._value = {number: value.to(device) for number, value in self._value.items()}

    def of(self, place: Place) -> torch.Tensor:
        """After `reduce`: of the target's mean gradient."""
        return self._value[place.number]

    def difference(self, place: Place) -> torch.Tensor:
        """After `reduce`: e, in the unit of `of`."""
        return self._difference[place.number]

    def reduce(self, chunk: int) -> None:
        """Sum a chunk's over the ranks that hold parts of them, and over all data ranks
        (collective: one all-reduce per group)."""
        for values in (self._value, self._difference) if self.wanted else ():
            self._reduce(chunk, values)

    def _reduce(self, chunk: int, values: dict[int, torch.Tensor]) -> None:
        own = [p for p in self._places if p.owned.chunk == chunk and p.number in values]
        groups = {id(g): g for p in own for g in p.target_sums}
        for group in groups.values():
            members = [p for p in own if any(g is group for g in p.target_sums)]
            flat = torch.cat([values[p.number].reshape(-1) for p in members])
            with meter.part("exchange"):
                collectives.all_reduce(flat, group)
            parts = flat.split([values[p.number].numel() for p in members])
            for place, part in zip(members, parts, strict=True):
                values[place.number] = part.view(values[place.number].shape)
        for place in own:
            averaged = place.owned.partial == "tensor"  # Megatron averages some over these ranks
            values[place.number] *= self._to_mean * (place.owned.count if averaged else 1.0)
