"""Inner products of the rows and the target: all that a projection needs to know.

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import torch
from torch import Tensor


def gram_of(rows_BRK: Tensor) -> Tensor:
    """X X^T [B, R, R] in float64, where X stacks the M rows and, last, the target.

    The grams of disjoint parts of a block's elements add up to the block's gram.
    """
    rows_BRK = rows_BRK.double()
    return rows_BRK @ rows_BRK.mT


def gram_of_long(rows_RN: Tensor) -> Tensor:
    """X X^T [R, R] in float64 of long rows in float32, such as whole gradients.

    Products of runs of 512 elements are summed in float32, the runs in float64: within about 1e-8
    |x_i| |x_j| of float64 throughout, in 0.5 to 0.9 of its time (`benchmarks/products.py`). A TF32
    product would keep 10 bits: it is not used, whatever torch is told elsewhere.
    """
    run, length = 512, rows_RN.shape[1]
    whole = length - length % run
    runs_CRN = rows_RN[:, :whole].unflatten(1, (-1, run)).transpose(0, 1)
    rest_RN = rows_RN[:, whole:]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        products_CRR, rest_RR = runs_CRN @ runs_CRN.mT, rest_RN @ rest_RN.mT
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    total_RR: Tensor = products_CRR.sum(0, dtype=torch.float64) + rest_RR
    return total_RR


def split(gram_BRR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G = J J^T [B, M, M], c = J t [B, M] and |t|^2 [B], out of `gram_of`'s result."""
    return gram_BRR[:, :-1, :-1], gram_BRR[:, :-1, -1], gram_BRR[:, -1, -1]
