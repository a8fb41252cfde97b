"""Several target sets in the microbatches of one step."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_dr.data.order import TargetStream

Batch = dict[str, Any]


def order_of(microbatches: Mapping[str, int], in_turn: bool = False) -> tuple[str, ...]:
    """The set of each microbatch of a step, of so many of each: in as many equal rounds as there
    can be, so that where all are even each half of the step has a like share of every set.

    Args:
        in_turn: one set's microbatches after the other's.
    """
    rounds = 1 if in_turn else math.gcd(*microbatches.values())
    of_round = [name for name, n in microbatches.items() for _ in range(n // rounds)]
    return tuple(of_round * rounds)


class MixedStream:
    """An endless iterator over a data rank's target microbatches, each of one set.

    Args:
        streams: by set; each keeps its own order.
        order: the set of each microbatch of a step (`order_of`).
    """

    def __init__(self, streams: Mapping[str, TargetStream], order: Sequence[str]) -> None:
        self.streams, self.order, self._next = streams, order, 0

    @property
    def consumed(self) -> dict[str, int]:
        """Of each set, sequences taken by all data ranks together: its place. Setting it begins a
        step there; a set that is not in it begins at 0."""
        return {name: stream.consumed for name, stream in self.streams.items()}

    @consumed.setter
    def consumed(self, places: Mapping[str, int]) -> None:
        self._next = 0
        for name, stream in self.streams.items():
            stream.consumed = places.get(name, 0)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        name = self.order[self._next % len(self.order)]
        self._next += 1
        return next(self.streams[name])

    def origins(self, consumed: Mapping[str, int], microbatch: int) -> list[str]:
        """Where the samples of a step's microbatch are from, the step beginning at `consumed`."""
        name, before = self.order[microbatch], self.order[:microbatch]
        return self.streams[name].origins(consumed.get(name, 0), before.count(name))
