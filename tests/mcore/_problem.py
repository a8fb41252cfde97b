"""The dense projection: what is solved, by other solvers than the plugin's."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq, minimize, nnls

from megatron_dr.projection import CountSketch, key_of

Parameters = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """What is solved: the names as in DRConfig."""

    set: str = "cone"
    fraction: float = 0.5
    step_length: float = 0.0
    ridge: float = 0.3
    radius: float = 0.5
    alpha: float = 0.1
    beta: float = 0.0
    alpha_style: str = "constant"
    end_alpha: float = 0.0
    alpha_steps: int = 1
    norm: str = "general"
    blocks: str = "model"
    gram: str = "exact"
    sketch_size: int = 256
    seed: int = 3


def block(name: str, kind: str) -> str:
    if kind == "matrix":
        return name
    if kind == "model":
        return ""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else ".".join(parts[:-1])


def blocks(kind: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters' names by block, in order."""
    out: dict[str, list[str]] = {}
    for name in names:
        out.setdefault(block(name, kind), []).append(name)
    return dict(sorted(out.items()))


def solve(problem: Problem, j: np.ndarray, t: np.ndarray) -> np.ndarray:
    """argmin_w 1/2 |J^T w - t|^2 + (rho/2) tr(G)/M |w - 1/M|^2 over the set; J [M, N]."""
    m = len(j)
    mean = np.full(m, 1.0 / m)
    if problem.set == "mean":
        return mean
    if problem.set == "target":
        return np.zeros(m)
    if problem.set in ("topk", "greedy"):
        k = max(1, int(problem.fraction * m))
        chosen: list[int] = []
        while len(chosen) < k:
            others = [i for i in range(m) if i not in chosen]
            if problem.set == "topk":
                chosen.append(max(others, key=lambda i: j[i] @ t))
            elif problem.step_length:
                e = problem.step_length
                gain = lambda i: e * j[i] @ t - e**2 * sum(j[i] @ j[n] for n in chosen)  # noqa: B023, E731
                chosen.append(max(others, key=gain))
            else:
                chosen.append(
                    min(others, key=lambda i: np.sum((j[chosen + [i]].sum(0) / k - t) ** 2))  # noqa: B023
                )
        return np.isin(np.arange(m), chosen) / k
    if problem.set == "filter":
        order = np.argsort(j @ t)
        dropped = order[: int(problem.fraction * np.sum(j @ t < 0))]
        kept = ~np.isin(np.arange(m), dropped)
        return kept / max(kept.sum(), 1)
    if problem.set == "halfspace":
        step = -min(0.0, float(t @ j.mean(0))) / float(j.mean(0) @ j.mean(0))
        return step * mean
    if problem.set == "ball":
        return _ball(problem, j, t)
    root = math.sqrt(problem.ridge * (j * j).sum() / m)
    a = np.vstack([j.T, root * np.eye(m)])
    b = np.concatenate([t, root * CENTRE[problem.set] * mean])
    if problem.set == "span":
        return np.linalg.lstsq(a, b, rcond=None)[0]
    if problem.set == "cone":
        return nnls(a, b)[0] if j.any() else mean
    upper = 1.0 if problem.set == "hull" else 1.0 / (problem.fraction * m)
    h, c = a.T @ a, a.T @ b
    scale = 1.0 / np.trace(h)
    result = minimize(
        lambda w: scale * (0.5 * w @ h @ w - c @ w),
        mean,
        jac=lambda w: scale * (h @ w - c),
        bounds=[(0.0, upper)] * m,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1.0, "jac": lambda w: np.ones(m)},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    return result.x


def _ball(problem: Problem, j: np.ndarray, t: np.ndarray) -> np.ndarray:
    """w = 1/M + (s G + rho)^-1 (c - G/M), s >= 1 the least that keeps |d - mean| <= r |mean|."""
    m, g = len(j), j @ j.T
    rho, b = problem.ridge * np.trace(g) / m, j @ (t - j.mean(0))
    away = lambda s: np.linalg.solve(s * g + rho * np.eye(m), b)  # noqa: E731
    excess = lambda s: (  # noqa: E731
        np.linalg.norm(j.T @ away(s)) / np.linalg.norm(j.mean(0)) - problem.radius
    )
    s = 1.0 if excess(1.0) <= 0 else brentq(excess, 1.0, 1e9, xtol=1e-12, rtol=1e-14)
    return 1.0 / m + away(s)


CENTRE = {"span": 1.0, "cone": 1.0, "hull": 1.0, "capped": 1.0}


def project(
    problem: Problem, general: list[Parameters], t: Parameters, step: int = 0
) -> tuple[Parameters, dict[str, np.ndarray]]:
    """The update, and the weights of each block."""
    update, weights = {}, {}
    alpha = 1.0 if problem.set == "target" else _alpha(problem, step)
    for name, members in blocks(problem.blocks, t).items():
        flat = lambda g: torch.cat([g[n].reshape(-1) for n in members]).numpy()  # noqa: B023, E731
        j, target = np.stack([flat(g) for g in general]), flat(t)
        seen = np.vstack([j, target])  # what the plugin multiplies: whole rows, or sketches
        if problem.gram == "sketch":
            seen = sketched(problem, [{n: g[n] for n in members} for g in [*general, t]], step)
        w = solve(problem, seen[:-1], seen[-1])
        own = 1.0 if problem.set in ("target", "halfspace") else 0.0
        d, seen_d = j.T @ w + own * target, seen[:-1].T @ w + own * seen[-1]
        length, g, mean = np.linalg.norm(seen_d), j.mean(0), seen[:-1].mean(0)
        if problem.norm != "none" and length > 0:
            wanted = np.linalg.norm(mean if problem.norm == "general" else seen[-1])
            d, g = d * wanted / length, g * wanted / np.linalg.norm(mean)
        d = (1 - problem.beta) * d + problem.beta * g
        d = torch.from_numpy((1 - alpha) * d + alpha * target)
        weights[name] = w
        for n, part in zip(members, d.split([t[n].numel() for n in members]), strict=True):
            update[n] = part.view(t[n].shape)
    return update, weights


def _alpha(problem: Problem, step: int) -> float:
    """From alpha to end_alpha over the run, as the style says."""
    done = min(1.0, step / problem.alpha_steps)
    if problem.alpha_style == "constant":
        return problem.alpha
    if problem.alpha_style == "cosine":
        done = 0.5 * (1.0 - math.cos(math.pi * done))
    return problem.alpha + done * (problem.end_alpha - problem.alpha)


def sketched(problem: Problem, vectors: list[Parameters], step: int) -> np.ndarray:
    """CountSketches of dense gradients: the same function that the ranks apply to their pieces."""
    sketch = CountSketch(problem.sketch_size, problem.seed * 1_000_003 + step)
    out = torch.zeros(len(vectors), problem.sketch_size, dtype=torch.float64)
    for name in vectors[0]:
        values = torch.stack([v[name].reshape(-1) for v in vectors])
        sketch.add_(out, values, torch.arange(values.shape[1]), key_of(name))
    return out.numpy()


def sketch_error(problem: Problem, general: list[Parameters], t: Parameters, step: int) -> float:
    """What the log estimates: sqrt(sum_b (tr(G)^2 + |G|_F^2)/K / sum_b |G|_F^2), G sketched."""
    error = length = 0.0
    for members in blocks(problem.blocks, t).values():
        seen = sketched(problem, [{n: g[n] for n in members} for g in [*general, t]], step)
        gram = seen @ seen.T
        length += np.sum(gram**2)
        error += (np.trace(gram) ** 2 + np.sum(gram**2)) / problem.sketch_size
    return math.sqrt(error / length)
