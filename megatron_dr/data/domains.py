"""Which domain a general microbatch holds: every rank knows it, also one that reads no data."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

# Longest period of a plan: 0.2 s to make, 0.8 MB to keep; weights of five decimals are exact.
MAX_PERIOD = 100_000


class Order(Protocol):
    """Which domain a unit holds, by its number in the run."""

    def domain(self, q: int) -> int:
        """The domain of unit q."""

    def count_before(self, q: int) -> int:
        """How many units before q have q's domain."""


class DomainPlan:
    """Domain of unit q = 0, 1, 2, ...: the one that is furthest behind its share.

        domain(q) = argmax over d of w_d (q + 1) - count_d(q)      the first of equals

    count_d(q): how many units before q have domain d; w: the weights, with sum 1, n of them.
    Megatron's BlendedDataset orders single samples by the same rule. Then, after any q units,

        -(1/2 + 1/3 + ... + 1/n) <= count_d(q) - w_d q <= 1 - 1/n.

    Right: the n lags w_d (q + 1) - count_d(q) sum to 1, so the largest, which is served, is at
    least 1/n. Left: let a_k be the mean of the k largest lags after a unit. If the one served is
    not among the k largest after it, it was above them before, so a_k <= old a_{k+1} + 1/(k+1);
    if it is, a_k <= old a_k. As a_n = 0, a_1 <= 1/n + ... + 1/2.

    With w_d = c_d / L in whole numbers, count_d(L) = c_d by the right side, so that the order
    repeats after L units: one period of it answers for every q.

    A unit is one microbatch index of one row group: the data-parallel ranks that exchange tokens,
    and so form a row together (`domains_of_step`).

    Args:
        weights: one per domain, on any scale, taken as the decimal numbers that they print as.
            Where their period is longer than MAX_PERIOD, w is rounded to about 1 / MAX_PERIOD.

    Attributes:
        weights: the weights w that the order follows.
        counts: the whole numbers c, with the period L as their sum.

    Raises:
        ValueError: no weight, or one that is not positive and finite.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        counts = _whole(weights)
        period = sum(counts)
        self.weights = tuple(c / period for c in counts)
        self.counts = counts
        self._domain, self._earlier, _ = order(counts, period, period)

    def domain(self, q: int) -> int:
        """The domain of unit q."""
        return int(self._domain[q % len(self._domain)])

    def count_before(self, q: int) -> int:
        """How many units before q have q's domain."""
        periods, place = divmod(q, len(self._domain))
        return periods * self.counts[int(self._domain[place])] + int(self._earlier[place])

    def counts_before(self, q: int) -> list[int]:
        """How many units before q each domain has."""
        periods, place = divmod(q, len(self._domain))
        begun = np.bincount(self._domain[:place], minlength=len(self.counts))
        return [periods * count + int(more) for count, more in zip(self.counts, begun, strict=True)]


def domains_of_step(
    plan: Order, first_microbatch: int, num_microbatches: int, rank: int, ranks: int,
    peers: int,
) -> list[int]:  # fmt: skip
    """Domains of a data-parallel rank's general microbatches in a step.

    Microbatch m of the run on rank r is in unit q = m D/P + r // P.

    Args:
        first_microbatch: the step's first m: general microbatches of a rank in the steps before.
        rank, ranks: r and D, data-parallel rank and size (context-parallel ranks not counted).
        peers: P, neighbouring data-parallel ranks that form a row together; divides D.
    """
    assert ranks % peers == 0 and 0 <= rank < ranks
    groups = ranks // peers
    microbatches = range(first_microbatch, first_microbatch + num_microbatches)
    return [plan.domain(m * groups + rank // peers) for m in microbatches]


def _whole(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, with a sum up to about MAX_PERIOD."""
    if not weights or any(not (math.isfinite(w) and w > 0) for w in weights):
        given = " ".join(str(w) for w in weights) or "none"
        raise ValueError(f"the weights of domains must be positive numbers, not {given}.")
    exact = [Fraction(str(float(w))) for w in weights]
    shares = [w / sum(exact) for w in exact]
    period = min(math.lcm(*(s.denominator for s in shares)), MAX_PERIOD)
    return [max(1, round(s * period)) for s in shares]


def order(
    shares: Sequence[int], total: int, units: int, lag: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """`DomainPlan`'s rule for so many units with w = shares / total, from the lags that there are.

    Args:
        lag: total times each domain's sum of w - count over the units before; none: zeros.

    Returns:
        Domain of each unit, number of these units before it of the same domain; int32 [units].
        The lags after them.
    """
    domain, earlier = np.empty(units, np.int32), np.empty(units, np.int32)
    share, seen = np.array(shares, np.int64), [0] * len(shares)
    behind = np.zeros(len(shares), np.int64) if lag is None else np.array(lag, np.int64)
    for q in range(units):
        behind += share  # exact: whole numbers
        served = int(behind.argmax())
        behind[served] -= total
        domain[q], earlier[q] = served, seen[served]
        seen[served] += 1
    return domain, earlier, behind.tolist()
