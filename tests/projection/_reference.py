"""The oracle: dense, slow, obviously correct; a block at a time, from the gradients themselves."""

import itertools

import numpy as np
from scipy.optimize import nnls

Array = np.ndarray


def stacked(J_MN: Array, t_N: Array, ridge: float, centre: float) -> tuple[Array, Array]:
    """A, b with |A w - b|^2 = |J^T w - t|^2 + ridge tr(G)/M |w - centre|^2."""
    rows = len(J_MN)
    root = np.sqrt(ridge * (J_MN**2).sum() / rows)
    return np.vstack([J_MN.T, root * np.eye(rows)]), np.append(t_N, root * centre * np.ones(rows))


def cone(J_MN: Array, t_N: Array, ridge: float, centre: float) -> Array:
    """Non-negative least squares on the stacked system."""
    return nnls(*stacked(J_MN, t_N, ridge, centre))[0]


def span(J_MN: Array, t_N: Array, ridge: float, centre: float) -> Array:
    """Least squares on the stacked system, nearest to the centre."""
    A, b = stacked(J_MN, t_N, ridge, centre)
    start = np.full(len(J_MN), centre)
    return start + np.linalg.lstsq(A, b - A @ start, rcond=1e-8)[0]


def capped(J_MN: Array, t_N: Array, cap: float, ridge: float) -> Array:
    """Every face of {0 <= w <= cap, sum w = 1} by brute force: the best feasible minimiser."""
    rows = len(J_MN)
    A, b = stacked(J_MN, t_N, ridge, 1.0 / rows)
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


def topk(c_M: Array, k: int) -> Array:
    """The best of all k-subsets; the first in lexicographic order where several are best."""
    best = max(itertools.combinations(range(len(c_M)), k), key=lambda s: c_M[list(s)].sum())
    w = np.zeros(len(c_M))
    w[list(best)] = 1.0 / k
    return w
