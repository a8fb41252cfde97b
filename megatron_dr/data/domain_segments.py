"""Which domain a general microbatch holds where the domains' shares change in the run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_dr.data.domain_shares import whole
from megatron_dr.data.domains import DomainPlan, order

_KEPT = 4  # segments: those before the present one, it, and the next


class Segment(NamedTuple):
    """Units that are in a row and have the same shares.

    Attributes:
        start, length: in units.
        shares: of each domain, in whole numbers.
        lag: of each domain at the start: the sum of its shares over all units before, less its
            units times all shares.
        taken: units of each domain before the start.
    """

    start: int
    length: int
    shares: tuple[int, ...]
    lag: tuple[int, ...]
    taken: tuple[int, ...]


class Segments:
    """`DomainPlan` with shares that change from segment to segment.

        domain(q) = argmax over d of sum over units p <= q of w_d(p) - count_d(q)

    Lags go on from one segment to the next, so that a small share is served in its turn however
    short segments are, and its bounds hold: they nowhere need w to be the same in all units. With
    shares that never change it is `DomainPlan`'s order.

    What a domain is at q is a function of q and the segments alone, so that every rank has the same
    in every layout. A data loader's workers, which are forks that read ahead, see each segment that
    is added, through memory that they share with this process.

    Args:
        weights: of the blend, as `DomainPlan` has them.
        start: units of the run that were read in the blend's own shares.
        length: of the first two segments, in units: they have those shares.

    Attributes:
        given: the blend's shares, in whole numbers.

    Raises:
        ValueError: as `DomainPlan`.
    """

    def __init__(self, weights: Sequence[float], start: int, length: int) -> None:
        plan = DomainPlan(weights)
        self.given = whole(plan.counts)
        total, taken = sum(self.given), plan.counts_before(start)
        lag = [w * start - total * n for w, n in zip(self.given, taken, strict=True)]
        n = len(self.given)
        self._table = torch.zeros(_KEPT, 2 + 3 * n, dtype=torch.int64).share_memory_()
        self._added, self._orders = 0, dict[int, tuple[np.ndarray, np.ndarray, list[int]]]()
        self._put(Segment(start, length, self.given, tuple(lag), tuple(taken)))
        self.add(length, self.given)

    # -- what is read ----------------------------------------------------------------------------
    def domain(self, q: int) -> int:
        """The domain of unit q."""
        segment = self.at(q)
        return int(self._order(segment)[0][q - segment.start])

    def count_before(self, q: int) -> int:
        """How many units before q have q's domain."""
        segment = self.at(q)
        domain, earlier, _ = self._order(segment)
        place = q - segment.start
        return segment.taken[int(domain[place])] + int(earlier[place])

    def read(self, q: int, units: int) -> set[int]:
        """The domains of so many units from q on."""
        found, end = set[int](), q + units
        while q < end:
            segment = self.at(q)
            place, q = q - segment.start, segment.start + segment.length
            domain = self._order(segment)[0]
            found.update(np.unique(domain[place : end - segment.start]).tolist())
        return found

    def at(self, q: int) -> Segment:
        """The segment of unit q.

        Raises:
            RuntimeError: it is not known yet, or no more.
        """
        for row in self._table.tolist():
            if row[0] <= q < row[0] + row[1]:
                return self._segment(row)
        raise RuntimeError(f"the domain of unit {q} was asked for before it was decided.")

    # -- what comes ------------------------------------------------------------------------------
    @property
    def last(self) -> Segment:
        """The last one that is known."""
        return self._segment(self._table[(self._added - 1) % _KEPT].tolist())

    def add(self, length: int, shares: Sequence[int]) -> None:
        """The next one."""
        before = self.last
        domain, _, lag = self._order(before)
        counts = np.bincount(domain, minlength=len(self.given)).tolist()
        taken = tuple(n + more for n, more in zip(before.taken, counts, strict=True))
        self._put(Segment(before.start + before.length, length, tuple(shares), tuple(lag), taken))

    def _put(self, segment: Segment) -> None:
        row = self._table[self._added % _KEPT]
        row[1] = 0  # no unit's, while it is written
        row[2:] = torch.tensor([*segment.shares, *segment.lag, *segment.taken])
        row[0] = segment.start
        row[1] = segment.length
        self._added += 1

    def _segment(self, row: list[int]) -> Segment:
        n = len(self.given)
        shares, lag, taken = (tuple(row[2 + k * n : 2 + (k + 1) * n]) for k in range(3))
        return Segment(row[0], row[1], shares, lag, taken)

    def _order(self, segment: Segment) -> tuple[np.ndarray, np.ndarray, list[int]]:
        if segment.start not in self._orders:
            while len(self._orders) >= _KEPT:
                del self._orders[min(self._orders)]
            self._orders[segment.start] = order(
                segment.shares, sum(self.given), segment.length, segment.lag
            )
        return self._orders[segment.start]

    # -- a checkpoint's --------------------------------------------------------------------------
    def state(self, unit_size: int) -> dict[str, Any]:
        """The last two segments, in samples, and the blend's shares.

        Args:
            unit_size: samples in a unit.
        """
        last = self.last
        present = self.at(last.start - 1)
        return {
            "given": list(self.given),
            "start": present.start * unit_size,
            "lengths": [present.length * unit_size, last.length * unit_size],
            "shares": [list(present.shares), list(last.shares)],
            "lag": list(present.lag),
            "taken": [n * unit_size for n in present.taken],
        }

    def load(self, state: dict[str, Any], unit_size: int) -> None:
        """Go on from another run's. With units of another size the part of a unit that is over of a
        domain is left out.

        Raises:
            ValueError: a segment is no whole number of units.
        """
        for samples in (state["start"], *state["lengths"]):
            if samples % unit_size:
                raise ValueError(
                    f"domains' shares change after {state['start']:,} samples and in steps of "
                    f"{samples:,}, not a multiple of {unit_size}, --micro-batch-size x the ranks "
                    "of a row: resume with the sizes of the run before."
                )
        taken = tuple(-(-n // unit_size) for n in state["taken"])
        present, last = (length // unit_size for length in state["lengths"])
        shares, next_shares = state["shares"]
        self._added = 0
        self._orders.clear()
        self._table[:, 1] = 0
        start = state["start"] // unit_size
        self._put(Segment(start, present, tuple(shares), tuple(state["lag"]), taken))
        self.add(last, next_shares)
