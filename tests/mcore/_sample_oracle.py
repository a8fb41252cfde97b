"""Sample rows' oracle: a loop over samples in plain PyTorch, for the update and for the log."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_dr.projection.kronecker import Kronecker

from . import _data, _megatron, _oracle, _problem
from ._data import Layout
from ._oracle import Parameters
from ._problem import Problem
from ._samples import MICROBATCHES, SAMPLES, TARGETS, Case, batch


def _sample_gradients(p: Parameters, data: dict) -> tuple[list[Parameters], np.ndarray]:
    """Each sample's summed token-loss gradient U, and its tokens."""
    out = []
    for n in range(len(data["tokens"])):
        losses = _oracle.token_losses(p, data["tokens"][n], data["labels"][n])
        gradients = torch.autograd.grad((losses * data["loss_mask"][n]).sum(), list(p.values()))
        out.append(dict(zip(p, (g.detach() for g in gradients), strict=True)))
    return out, data["loss_mask"].sum(1).double().numpy()


def _mix(samples: list[Parameters], factors: Any) -> Parameters:
    return {k: sum(f * s[k] for f, s in zip(factors, samples, strict=True)) for k in samples[0]}


@dataclass(frozen=True)
class Window:
    """Samples that compete: their rows, tokens and target.

    Attributes:
        share: of the step's gradient.
        logged: what the log multiplies its vectors by, beside those of other windows.
        rank: whose threshold it is, where the window is streaming.
    """

    rows: list[Parameters]
    tokens: np.ndarray
    target: Parameters
    share: float
    logged: float
    rank: int = 0


@dataclass(frozen=True)
class Solved:
    """What a window did to one block: the rows' weights, and vectors as they are multiplied."""

    block: str
    weights: np.ndarray
    mean: np.ndarray
    target: np.ndarray
    direction: np.ndarray
    update: np.ndarray


def log_of(solved: list[Solved]) -> dict[str, float]:
    """A step's values for the log: mean numbers of rows, and angles and lengths of the model."""

    def dot(a: str, b: str) -> float:
        return sum(float(getattr(s, a) @ getattr(s, b)) for s in solved)

    def cosine(a: str) -> float:
        return dot(a, "target") / math.sqrt(dot(a, a) * dot("target", "target"))

    sizes = [np.abs(s.weights) for s in solved]
    effective = [w.sum() ** 2 / (w @ w) if w.any() else 0.0 for w in sizes]
    rest = dot("direction", "direction") - 2 * dot("direction", "target") + dot("target", "target")
    return {
        "dr rows": float(np.mean(effective)),
        "dr zero rows": float(np.mean([(w <= 1e-6 * w.max()).sum() for w in sizes])),
        "dr cos general": cosine("mean"),
        "dr cos update": cosine("update"),
        "dr residual": math.sqrt(max(rest, 0.0) / dot("target", "target")),
    }


class Oracle:
    """Keeps what a run keeps between steps: a cached target and running thresholds.

    Attributes:
        solved: in the last update, of every window and block.
    """

    def __init__(self, layout: Layout, case: Case) -> None:
        self.layout, self.case = layout, case
        self.solved: list[Solved] = []
        self.cached: Any = None
        self.thresholds: list[dict[str, float]] = [{} for _ in range(layout.dp)]

    def update(self, p: Parameters, step: int) -> Parameters:
        """The gradient that the optimizer gets."""
        layout, case = self.layout, self.case
        ranks, numbers = range(layout.dp), range(MICROBATCHES)
        merged = case.target_pass == "merged"
        general = [[_sample_gradients(p, batch(layout, "general", step, r, n, SAMPLES))
                    for n in numbers] for r in ranks]  # fmt: skip
        if step % case.target_refresh == 0:
            size = TARGETS if merged else SAMPLES
            self.cached = [[_sample_gradients(p, batch(layout, "target", step, r, n, size))
                            for n in numbers] for r in ranks]  # fmt: skip
        target = self.cached
        tokens = sum(t.sum() for rank in general for _, t in rank)
        mean_t = self._target(target)
        self.solved = []
        windows = []
        if case.window == "step":
            rows, counts = [], []
            for rank in general:
                for samples, own in rank:
                    rows += [_mix([s], [self._share(own, tokens) / own.sum()]) for s in samples]
                    counts += list(own)
            rows = [_mix([row], [len(rows)]) for row in rows]
            windows.append(Window(rows, np.array(counts), mean_t, 1.0, 1.0))
        else:
            for r in ranks:
                for n in numbers:
                    samples, own = general[r][n]
                    share = self._share(own, tokens)
                    rows = [_mix([s], [len(samples) / own.sum()]) for s in samples]
                    t = self._mean([target[r][n]]) if merged else mean_t
                    logged = share
                    if merged and not layout.per_token:  # its mean loss is of target tokens too
                        logged *= own.sum() / (own.sum() + target[r][n][1].sum())
                    windows.append(Window(rows, own, t, share, logged, r))
        total = {k: torch.zeros_like(v.detach()) for k, v in p.items()}
        for window in windows:
            for name, value in self._project(window).items():
                total[name] += value
        if case.window == "streaming":
            keys = self.thresholds[0]
            mean = {k: float(np.mean([h[k] for h in self.thresholds])) for k in keys}
            self.thresholds = [dict(mean) for _ in ranks]
        return total

    def _share(self, own: np.ndarray, tokens: float) -> float:
        """Of a microbatch in the step's gradient."""
        layout = self.layout
        return own.sum() / tokens if layout.per_token else 1 / layout.dp / MICROBATCHES

    def _mean(self, parts: list[Any]) -> Parameters:
        """The mean token loss's gradient, or the mean over microbatches of theirs."""
        if self.layout.per_token:
            tokens = sum(own.sum() for _, own in parts)
            samples = [s for part, _ in parts for s in part]
            return _mix(samples, [1 / tokens] * len(samples))
        each = [_mix(samples, [1 / own.sum()] * len(samples)) for samples, own in parts]
        return _mix(each, [1 / len(each)] * len(each))

    def _target(self, target: list[list[Any]]) -> Parameters:
        """The mean of all, or of several sets' own means by weight; microbatch n is of set n."""
        if not self.layout.target_sets:
            return self._mean([part for rank in target for part in rank])
        assert self.layout.target_sets == (0, 1)
        means = [self._mean([rank[n] for rank in target]) for n in range(2)]
        return _mix(means, _data.SET_WEIGHTS)

    def _project(self, window: Window) -> Parameters:
        """A window's part of the gradient."""
        case, update, t = self.case, {}, window.target
        problem = Problem(case.set, case.fraction, case.step_length, blocks=case.blocks)
        for block, members in _problem.blocks(case.blocks, t).items():
            flat = lambda g: torch.cat([g[n].reshape(-1) for n in members]).numpy()  # noqa: B023, E731
            j, target = np.stack([flat(g) for g in window.rows]), flat(t)
            seen_j = np.stack([self._seen(g, members) for g in window.rows])
            seen_t = self._seen(t, members)
            if case.window == "streaming":
                w = self._streamed(block, seen_j @ seen_t / (seen_t @ seen_t), window.rank)
            else:
                w = _problem.solve(problem, seen_j, seen_t)
            helper = 1.0 if case.set in ("target", "halfspace") else 0.0
            alpha = 1.0 if case.set == "target" else case.alpha
            scale = self._scale(seen_j, seen_t, w, helper, window.tokens)
            as_mean = self._scale(seen_j, seen_t, np.full(len(w), 1 / len(w)), 0.0, window.tokens)
            mixed = lambda d, g, t: (  # noqa: E731
                (1 - alpha) * ((1 - case.beta) * scale * d + case.beta * as_mean * g) + alpha * t  # noqa: B023
            )
            d = mixed(j.T @ w + helper * target, j.mean(0), target)
            direction = seen_j.T @ w + helper * seen_t
            seen = (seen_j.mean(0), seen_t, direction, mixed(direction, seen_j.mean(0), seen_t))
            self.solved.append(Solved(block, w, *(window.logged * vector for vector in seen)))
            sizes = [t[n].numel() for n in members]
            for name, part in zip(
                members, torch.from_numpy(window.share * d).split(sizes), strict=True
            ):
                update[name] = part.view(t[name].shape)
        return update

    def _scale(self, j: Any, t: Any, w: Any, helper: float, own: np.ndarray) -> float:
        rule = self.case.norm
        if rule == "tokens":
            share = float(w @ own / own.sum()) * len(w)
            return 1 / share if share > 0 else 1.0
        d = j.T @ w + helper * t
        wanted = {"none": d, "general": j.mean(0), "target": t}[rule]
        return float(np.linalg.norm(wanted) / np.linalg.norm(d)) if np.linalg.norm(d) > 0 else 1.0

    def _streamed(self, block: str, scores: np.ndarray, rank: int) -> np.ndarray:
        own = float(np.quantile(scores, 1 - self.case.fraction, method="midpoint"))
        threshold = self.thresholds[rank].get(block, own)
        self.thresholds[rank][block] = 0.9 * threshold + 0.1 * own
        return (scores > threshold) / (self.case.fraction * len(scores))

    def _seen(self, g: Parameters, members: list[str]) -> np.ndarray:
        """What is multiplied: whole gradients, or matrices' sketches."""
        return np.concatenate([self._sketch(n, g[n]).reshape(-1).numpy() for n in members])

    def _sketch(self, name: str, g: torch.Tensor) -> torch.Tensor:
        case = self.case
        if case.score != "sketched" or g.dim() == 1:
            return g
        sketch = Kronecker(name, *g.shape, case.kronecker_out, case.kronecker_in, case.seed)
        sides = [sketch.columns(side, None, "cpu", torch.float64) for side in ("out", "in")]
        p_out, p_in = (
            torch.eye(n).double() if s is None else s for s, n in zip(sides, g.shape, strict=True)
        )
        return p_out @ g @ p_in.T


class WideOracle(Oracle):
    """The samples of all ranks whose tokens an expert sees compete together."""

    def update(self, p: Parameters, step: int) -> Parameters:
        total = super().update(p, step)
        ranks, numbers = range(self.layout.dp), range(MICROBATCHES)
        names = [name for name in p if ".experts." in name]
        mean_t = self._mean([part for rank in self.cached for part in rank])
        target = {name: mean_t[name] for name in names}
        general = [[self._gradients(p, step, r, n, names) for n in numbers] for r in ranks]
        tokens = sum(own.sum() for rank in general for _, own in rank)
        total.update({name: torch.zeros_like(p[name].detach()) for name in names})
        self.solved = [s for s in self.solved if ".experts." not in s.block]
        together = max(1, self.layout.dp_per_row // self.layout.cp)
        for first in range(0, self.layout.dp, together):
            for parts in zip(*general[first : first + together], strict=True):
                equal = 1 / len(ranks) / len(numbers)
                share = [own.sum() / tokens if self.layout.per_token else equal for _, own in parts]
                rows = [
                    _mix([s], [f / own.sum() / sum(share) * len(samples) * len(parts)])
                    for f, (samples, own) in zip(share, parts, strict=True)
                    for s in samples
                ]
                own = np.concatenate([own for _, own in parts])
                window = Window(rows, own, target, sum(share), sum(share))
                for name, value in self._project(window).items():
                    total[name] += value
        return total

    def _gradients(self, p: Parameters, step: int, rank: int, n: int, names: list[str]) -> Any:
        data = batch(self.layout, "general", step, rank, n, SAMPLES)
        samples, own = _sample_gradients(p, data)
        return [{name: s[name] for name in names} for s in samples], own


def oracle(
    layout: Layout, case: Case, steps: int, kind: type[Oracle] = Oracle
) -> tuple[Parameters, list[dict[str, float]]]:
    """Parameters after steps of clipped AdamW, and each step's log."""
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(layout).items()}
    optimizer = torch.optim.AdamW(p.values(), lr=_megatron.LEARNING_RATE, eps=_megatron.EPS,
                                  weight_decay=0.0, betas=(0.9, 0.999))  # fmt: skip
    state, log = kind(layout, case), []
    for step in range(steps):
        update = state.update(p, step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in p.items():
            value.grad = update[name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
        log.append(log_of(state.solved))
    return {k: v.detach() for k, v in p.items()}, log
