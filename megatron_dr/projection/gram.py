"""Inner products of the rows and the target: all that a projection needs to know.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

from torch import Tensor


def gram_of(rows_BRK: Tensor) -> Tensor:
    """X X^T [B, R, R] in float64, where X stacks the M rows and, last, the target.

    The grams of disjoint parts of a block's elements add up to the block's gram.
    """
    rows_BRK = rows_BRK.double()
    return rows_BRK @ rows_BRK.mT


def split(gram_BRR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G = J J^T [B, M, M], c = J t [B, M] and |t|^2 [B], out of `gram_of`'s result."""
    return gram_BRR[:, :-1, :-1], gram_BRR[:, :-1, -1], gram_BRR[:, -1, -1]
