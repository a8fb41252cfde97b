"""How much of each domain is read, from the weights that its row had.

What it changes, and what it doesn't. A domain's row is the mean gradient of its own samples in the
step, so with more samples of a domain

    E[row_d] = the domain's gradient     stays,       Var[row_d] = (a sample's) / n_d     falls,

and the mean of the rows, 1/M sum_d row_d, stays the plain mean over domains. Neither weighs a
domain by how much of it is read, so that a weight is not counted twice: shares say where samples
are spent, weights alone say where the update goes. Two things are not free of shares:

* A gram has |row_d|^2, whose mean is that of the domain's gradient plus the variance: a domain that
  is read less looks longer, and sets that look at lengths give it less. The bounds hold that.
* A domain without a sample in a step has a zero row there, and the mean of the rows lacks it. Its
  weight in that step says nothing, so that its average stays.

Legend: n domains.
"""

from collections.abc import Sequence

import torch

RESOLUTION = 1 << 40  # shares are whole numbers with about this sum


def averaged(
    average_n: torch.Tensor, weight_n: torch.Tensor, present_n: torch.Tensor, rate: float
) -> torch.Tensor:
    """The average after a step; on the weights' device, without waiting for it.

        a_d + rate (A w_d / W - a_d)   of those with samples in the step,

    w the weights, a negative one being 0, W their sum and A that of the a_d, over the same domains.
    So the a_d keep their sum, and those without samples keep theirs. Where no weight is positive,
    or one is not finite, all of them do.

    Args:
        average_n: a, float64 with sum 1.
        weight_n: of the rows, in any unit.
        present_n: 1.0 with samples in the step, else 0.0.
        rate: how much of the step, 0 to 1.
    """
    weight_n = weight_n.to(average_n).clamp(min=0.0) * present_n
    total = weight_n.sum()
    kept = (average_n * present_n).sum()
    new_n = average_n + rate * present_n * (kept * weight_n / total - average_n)
    return torch.where((total > 0) & total.isfinite(), new_n, average_n)


def whole(given: Sequence[int]) -> tuple[int, ...]:
    """Whole numbers in the same ratio, with a sum of about RESOLUTION."""
    factor = max(1, RESOLUTION // sum(given))
    return tuple(number * factor for number in given)


def between(
    average: Sequence[float], given: Sequence[int], low: float, high: float
) -> tuple[int, ...]:
    """Shares p, the nearest to the averages a that the bounds allow:

        argmin of sum_d (p_d - a_d)^2 / b_d   over  low b_d <= p_d <= high b_d, sum_d p_d = 1.

    That is p_d = b_d clip(a_d / b_d + x, low, high) with the x for which the sum is 1: what bounds
    take from some or give to some is made up for by the others in the ratio of b.

    Args:
        average: a, with sum 1.
        given: b as `whole` numbers.
        low, high: factors of b, low <= 1 <= high.

    Returns:
        p in whole numbers with the sum of `given`; with low = high = 1 they are `given`.
    """
    total = sum(given)
    factors = [a * total / b for a, b in zip(average, given, strict=True)]

    def clipped(x: float) -> list[float]:
        return [b * min(max(f + x, low), high) for f, b in zip(factors, given, strict=True)]

    least, most = low - max(factors), high - min(factors)
    for _ in range(128):  # down to neighbouring numbers
        middle = (least + most) / 2
        least, most = (middle, most) if sum(clipped(middle)) < total else (least, middle)
    found = [round(p) for p in clipped(most)]
    largest = max(range(len(found)), key=found.__getitem__)
    found[largest] += total - sum(found)  # of rounding
    return tuple(found)
