"""The oracle: dense, slow, obviously correct; a block at a time, from the gradients themselves."""

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray


def stacked(J_MN: Array, t_N: Array, ridge: float) -> tuple[Array, Array]:
    """A, b with |A w - b|^2 = |J^T w - t|^2 + ridge tr(G)/M |w - 1/M|^2."""
    rows = len(J_MN)
    root = np.sqrt(ridge * (J_MN**2).sum() / rows)
    return np.vstack([J_MN.T, root * np.eye(rows)]), np.append(t_N, root * np.ones(rows) / rows)


def cone(J_MN: Array, t_N: Array, ridge: float) -> Array:
    """Non-negative least squares on the stacked system."""
    return nnls(*stacked(J_MN, t_N, ridge))[0]


def span(J_MN: Array, t_N: Array, ridge: float) -> Array:
    """Least squares on the stacked system, nearest to equal weights."""
    A, b = stacked(J_MN, t_N, ridge)
    start = np.full(len(J_MN), 1.0 / len(J_MN))
    return start + np.linalg.lstsq(A, b - A @ start, rcond=1e-8)[0]


def capped(J_MN: Array, t_N: Array, cap: float, ridge: float) -> Array:
    """Every face of {0 <= w <= cap, sum w = 1} by brute force: the best feasible minimiser."""
    rows = len(J_MN)
    A, b = stacked(J_MN, t_N, ridge)
    best, best_value = np.full(rows, 1.0 / rows), np.inf
    for state in itertools.product((0.0, cap, None), repeat=rows):
        w = _face_minimiser(A, b, state)
        if w is not None and w.min() >= -1e-9 and w.max() <= cap + 1e-9:
            value = ((A @ w - b) ** 2).sum()
            if value < best_value:
                best, best_value = w, value
    return best


def _face_minimiser(A: Array, b: Array, state: tuple[float | None, ...]) -> Array | None:
    """Minimise on the face where fixed weights have their bound and the others sum to the rest."""
    free = [i for i, s in enumerate(state) if s is None]
    w = np.array([0.0 if s is None else s for s in state])
    rest = 1.0 - w.sum()
    if not free:
        return w if abs(rest) < 1e-9 else None
    H, k = A[:, free].T @ A[:, free], len(free)
    system = np.block([[H, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
    right = np.append(A[:, free].T @ (b - A @ w), rest)
    w[free] = np.linalg.lstsq(system, right, rcond=1e-12)[0][:k]
    return w if abs(w.sum() - 1.0) < 1e-9 else None


def ball(J_MN: Array, t_N: Array, radius: float, ridge: float) -> Array:
    """Least squares from the mean; too far from it, ever heavier on the distance, by bisection.

    The multiplier s of the ball and the ridge enter as rows of a stacked system.
    """
    rows = len(J_MN)
    mean = J_MN.mean(0)
    root = np.sqrt(ridge * (J_MN**2).sum() / rows)

    def solution(s: float) -> Array:
        A = np.vstack([np.sqrt(s) * J_MN.T, root * np.eye(rows)])
        b = np.append((t_N - mean) / np.sqrt(s), np.zeros(rows))
        return np.linalg.lstsq(A, b, rcond=1e-8)[0]

    bound, low, high = radius * np.linalg.norm(mean), 0.0, 100.0
    if np.linalg.norm(J_MN.T @ solution(1.0)) <= bound:
        return 1.0 / rows + solution(1.0)
    for _ in range(100):
        middle = (low + high) / 2  # of log s
        inside = np.linalg.norm(J_MN.T @ solution(np.exp(middle))) <= bound
        low, high = (low, middle) if inside else (middle, high)
    return 1.0 / rows + solution(np.exp(high))


def halfspace(J_MN: Array, t_N: Array) -> Array:
    """The update itself: t without its part against the mean."""
    mean = J_MN.mean(0)
    return t_N - min(0.0, t_N @ mean) / (mean @ mean) * mean if mean.any() else t_N


def subset_error(J_MN: Array, t_N: Array, subset: Sequence[int], k: int) -> float:
    """|J^T 1_S/k - t|^2."""
    return float(((J_MN[list(subset)].sum(0) / k - t_N) ** 2).sum())


def best_subset(J_MN: Array, t_N: Array, k: int) -> tuple[int, ...]:
    """The k rows whose mean is nearest to the target, of all k-subsets."""
    subsets = itertools.combinations(range(len(J_MN)), k)
    return min(subsets, key=lambda s: subset_error(J_MN, t_N, s, k))


def greedy(J_MN: Array, t_N: Array, k: int) -> tuple[int, ...]:
    """Rows one at a time, each the one that leaves the smallest error."""
    taken: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(J_MN)) if i not in taken]
        taken.append(min(left, key=lambda i: subset_error(J_MN, t_N, [*taken, i], k)))
    return tuple(taken)


def pairwise_gain(J_MN: Array, t_N: Array, subset: Sequence[int], step: float) -> float:
    """step sum_i g_i.t - step^2 sum over pairs g_i.g_j, of the rows of a subset."""
    pairs = itertools.combinations(subset, 2)
    together = sum(float(J_MN[i] @ J_MN[j]) for i, j in pairs)
    return step * sum(float(J_MN[i] @ t_N) for i in subset) - step**2 * together


def greedy_by_pairs(J_MN: Array, t_N: Array, k: int, step: float) -> tuple[int, ...]:
    """Rows one at a time, each the one with the largest gain among all that are left."""
    taken: list[int] = []
    for _ in range(k):
        left = [i for i in range(len(J_MN)) if i not in taken]
        taken.append(max(left, key=lambda i: pairwise_gain(J_MN, t_N, [*taken, i], step)))
    return tuple(taken)


def topk(c_M: Array, k: int) -> Array:
    """The best of all k-subsets; the first in lexicographic order where several are best."""
    best = max(itertools.combinations(range(len(c_M)), k), key=lambda s: c_M[list(s)].sum())
    w = np.zeros(len(c_M))
    w[list(best)] = 1.0 / k
    return w


def filtered(c_M: Array, fraction: float) -> Array:
    """Mean of the rows left when the most negative ones are dropped."""
    negative = sorted((i for i in range(len(c_M)) if c_M[i] < 0), key=lambda i: c_M[i])
    dropped = negative[: int(fraction * len(negative))]
    w = np.array([0.0 if i in dropped else 1.0 for i in range(len(c_M))])
    return w / max(w.sum(), 1.0)
