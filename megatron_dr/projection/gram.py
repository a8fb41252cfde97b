"""Inner products of the rows and the target: all that a projection needs to know.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gram_of(rows_BRK: Tensor) -> Tensor:
    """X X^T [B, R, R] in float64, where X stacks the M rows and, last, the target.

    The grams of disjoint parts of a block's elements add up to the block's gram.
    """
    rows_BRK = rows_BRK.double()
    return rows_BRK @ rows_BRK.mT


def gram_of_long(parts_RN: Sequence[Tensor]) -> Tensor:
    """X X^T [R, R] in float64 of long rows in float32, such as whole gradients.

    Products of runs of 512 elements are summed in float32, the runs in float64: within about 1e-8
    |x_i| |x_j| of float64 throughout, in 0.5 to 0.9 of its time (`benchmarks/products.py`). A TF32
    product would keep 10 bits: it is not used, whatever torch is told elsewhere.

    :param parts_RN: the rows, in matrices of some each. Two are multiplied where they lie, the rows
        of the first being read twice; of more, a copy is multiplied.
    """
    if len(parts_RN) > 2:
        parts_RN = [torch.cat(list(parts_RN))]
    first_RN, *rest = parts_RN
    own_RR = _products(first_RN, first_RN)
    if not rest:
        return own_RR
    cross_RS = _products(first_RN, rest[0])
    beside_SS = _products(rest[0], rest[0])
    return torch.cat([torch.cat([own_RR, cross_RS], 1), torch.cat([cross_RS.T, beside_SS], 1)])


def _products(x_RN: Tensor, y_SN: Tensor) -> Tensor:
    """X Y^T [R, S] in float64."""
    run, length = 512, x_RN.shape[1]
    whole = length - length % run
    x_CRN, y_CSN = (z[:, :whole].unflatten(1, (-1, run)).transpose(0, 1) for z in (x_RN, y_SN))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        products_CRS, rest_RS = x_CRN @ y_CSN.mT, x_RN[:, whole:] @ y_SN[:, whole:].mT
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    total_RS: Tensor = products_CRS.sum(0, dtype=torch.float64) + rest_RS
    return total_RS


def split(gram_BRR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G = J J^T [B, M, M], c = J t [B, M] and |t|^2 [B], out of `gram_of`'s result."""
    return gram_BRR[:, :-1, :-1], gram_BRR[:, :-1, -1], gram_BRR[:, -1, -1]
