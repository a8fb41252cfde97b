"""Each row's weight and score in a step, on the host, for `--dr-record`: the most and the least.

Shape suffixes: B blocks of windows, M rows, R = M + 1 (rows plus target), N rows of all windows.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_dr.mcore.step.log import StepLog, Window


@dataclass(frozen=True)
class Chosen:
    """Rows of blocks, one after the other.

    Attributes:
        block, row: numbers of the block and, in the step, of the row [N].
        weight: share, 1 being what the row has in the plain mean [N].
        score: cosine of the row with the target; NaN where its length was not needed [N].
        left_out: rows that are not among them.
    """

    block: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    score: np.ndarray
    left_out: int = 0

    def __getitem__(self, index: np.ndarray) -> "Chosen":
        return Chosen(
            self.block[index], self.row[index], self.weight[index], self.score[index],
            self.left_out,
        )  # fmt: skip


def of_log(log: StepLog, most: int) -> Chosen:
    """What this rank speaks for; reads the device, once for windows of one shape. Forgets it.

    Args:
        most: rows of the largest weight, and of the least, of each block.
    """
    by_shape: dict[torch.Size, list[Window]] = {}
    for window in log.windows:
        by_shape.setdefault(window.update.weights_BM.shape[1:], []).append(window)
    log.windows.clear()
    return extremes(joined([_of_shape(alike) for alike in by_shape.values()]), most)


def joined(parts: list[Chosen]) -> Chosen:
    """All rows; of ranks that speak for the same one, the first has it."""
    if not parts:
        none = np.empty(0, np.int64)
        return Chosen(none, none, none.astype(float), none.astype(float))
    every = Chosen(
        np.concatenate([p.block for p in parts]), np.concatenate([p.row for p in parts]),
        np.concatenate([p.weight for p in parts]), np.concatenate([p.score for p in parts]),
        sum(p.left_out for p in parts),
    )  # fmt: skip
    _, first = np.unique(np.stack([every.block, every.row]), axis=1, return_index=True)
    return every[first]


def extremes(rows: Chosen, most: int) -> Chosen:
    """The rows of the largest and of the least weight of each block, by block and row; of equal
    ones those of the lowest numbers. NaN counts as the largest."""
    keep, weight = np.zeros(len(rows.row), bool), np.nan_to_num(rows.weight, nan=np.inf)
    for sign in (1.0, -1.0):
        order = np.lexsort((rows.row, sign * weight, rows.block))
        _, first, count = np.unique(rows.block[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(first, count)
        keep[order[place < most]] = True
    kept = rows[np.flatnonzero(keep)]
    kept = kept[np.lexsort((kept.row, kept.block))]
    return replace(kept, left_out=rows.left_out + len(keep) - int(keep.sum()))


def _of_shape(windows: list[Window]) -> Chosen:
    weight_BM = torch.cat([w.update.weights_BM for w in windows])
    gram_BRR = torch.cat([w.update.gram_BRR for w in windows])
    M = weight_BM.shape[1]
    row_BM = [w.row_M.cpu().expand(len(w.update.weights_BM), M) for w in windows]
    square_BR = gram_BRR.diagonal(dim1=1, dim2=2)
    length_BM = (square_BR[:, :M] * square_BR[:, M:]).sqrt()
    cosine_BM = torch.where(length_BM > 0, gram_BRR[:, :M, M] / length_BM, float("nan"))
    both_2BM = torch.stack([M * weight_BM, cosine_BM]).cpu().numpy()
    block_B = np.concatenate([np.asarray(w.blocks) for w in windows])
    return Chosen(
        np.repeat(block_B, M), torch.cat(row_BM).numpy().ravel(), both_2BM[0].ravel(),
        both_2BM[1].ravel(),
    )  # fmt: skip
