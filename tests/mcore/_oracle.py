"""The oracle: one process, plain PyTorch, float64, dense rows. Obviously correct, but slow.

Nothing here imports Megatron, and of the plugin only the sketch's hash: the model is written out by
the names of Megatron's parameters, the feasible sets are solved by scipy on the dense rows.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq, minimize, nnls

from megatron_dr.projection import CountSketch, key_of

from . import _data
from ._data import Layout

HIDDEN, HEADS, GROUPS, HEAD, FFN, LAYERS = 32, 4, 2, 8, 48, 4
EXPERTS, EXPERT_FFN, PADDED = 4, 24, 64
Parameters = dict[str, torch.Tensor]


def shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model without parallelism."""
    out: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (PADDED, HIDDEN)}
    if not layout.tied:
        out["output_layer.weight"] = (PADDED, HIDDEN)
    norms = ["decoder.final_layernorm"]
    gate = 1 if layout.layer_norm else 2
    for n in range(LAYERS):
        layer = f"decoder.layers.{n}."
        norms += [layer + "input_layernorm", layer + "pre_mlp_layernorm"]
        qkv = (HEADS + 2 * GROUPS) * HEAD
        _linear(out, layer + "self_attention.linear_qkv", qkv, HIDDEN, layout)
        _linear(out, layer + "self_attention.linear_proj", HIDDEN, HIDDEN, layout)
        if layout.qk_layernorm:
            out[layer + "self_attention.q_layernorm.weight"] = (HEAD,)
            out[layer + "self_attention.k_layernorm.weight"] = (HEAD,)
        if layout.moe:
            out[layer + "mlp.router.weight"] = (EXPERTS, HIDDEN)
            for e in range(EXPERTS):
                name = f"{layer}mlp.experts.local_experts.{e}."
                out[name + "linear_fc1.weight"] = (2 * EXPERT_FFN, HIDDEN)
                out[name + "linear_fc2.weight"] = (HIDDEN, EXPERT_FFN)
        else:
            _linear(out, layer + "mlp.linear_fc1", gate * FFN, HIDDEN, layout)
            _linear(out, layer + "mlp.linear_fc2", HIDDEN, FFN, layout)
    for name in norms:
        out[name + ".weight"] = (HIDDEN,)
        if layout.layer_norm:
            out[name + ".bias"] = (HIDDEN,)
    return out


def _linear(out: dict, name: str, rows: int, columns: int, layout: Layout) -> None:
    out[name + ".weight"] = (rows, columns)
    if layout.layer_norm:
        out[name + ".bias"] = (rows,)


def initial(layout: Layout) -> Parameters:
    generator = torch.Generator().manual_seed(7)
    out = {}
    for name, shape in sorted(shapes(layout).items()):
        values = 0.1 * torch.randn(shape, generator=generator)
        out[name] = 1.0 + values if "norm.weight" in name else values
    return out


# -- the model ---------------------------------------------------------------------------------
def _norm(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    if name + ".bias" in p:
        return torch.nn.functional.layer_norm(
            x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], 1e-5
        )
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * p[name + ".weight"]


def _apply(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, p[name + ".weight"], p.get(name + ".bias"))


def _rotate(x: torch.Tensor) -> torch.Tensor:
    """RoPE with base 10000 on [s, heads, d]."""
    s, d = x.shape[0], x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.arange(s, dtype=torch.float64), frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(p: Parameters, layer: str, x: torch.Tensor) -> torch.Tensor:
    s, per = x.shape[0], HEADS // GROUPS
    qkv = _apply(p, layer + "linear_qkv", x).view(s, GROUPS, per + 2, HEAD)
    q, k, v = qkv[:, :, :per].reshape(s, HEADS, HEAD), qkv[:, :, per], qkv[:, :, per + 1]
    if layer + "q_layernorm.weight" in p:
        q, k = _norm(p, layer + "q_layernorm", q), _norm(p, layer + "k_layernorm", k)
    q, k = _rotate(q), _rotate(k)
    k, v = k.repeat_interleave(per, 1), v.repeat_interleave(per, 1)
    scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(HEAD)
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(future, -math.inf).softmax(-1)
    context = torch.einsum("hst,thd->shd", probabilities, v).reshape(s, HIDDEN)
    return _apply(p, layer + "linear_proj", context)


def _mlp(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    h = _apply(p, name + "linear_fc1", x)
    if name + "linear_fc1.bias" in p:
        h = torch.nn.functional.gelu(h)
    else:
        gate, up = h.chunk(2, -1)
        h = torch.nn.functional.silu(gate) * up
    return _apply(p, name + "linear_fc2", h)


def _moe(p: Parameters, name: str, x: torch.Tensor) -> torch.Tensor:
    logits = x @ p[name + "router.weight"].T
    top, chosen = logits.topk(2, -1)
    weight = top.softmax(-1)
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        share = (weight * (chosen == e)).sum(-1, keepdim=True)
        out = out + share * _mlp(p, f"{name}experts.local_experts.{e}.", x)
    return out


def token_losses(p: Parameters, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token [s] of one sequence."""
    return torch.nn.functional.cross_entropy(logits(p, tokens), labels, reduction="none")


def hidden(p: Parameters, tokens: torch.Tensor) -> torch.Tensor:
    """[s, HIDDEN] after the final norm, of one sequence [s]."""
    x = p["embedding.word_embeddings.weight"][tokens]
    for n in range(LAYERS):
        layer = f"decoder.layers.{n}."
        h = _norm(p, layer + "input_layernorm", x)
        x = x + _attention(p, layer + "self_attention.", h)
        h = _norm(p, layer + "pre_mlp_layernorm", x)
        x = x + (_moe if layer + "mlp.router.weight" in p else _mlp)(p, layer + "mlp.", h)
    return _norm(p, "decoder.final_layernorm", x)


def logits(p: Parameters, tokens: torch.Tensor) -> torch.Tensor:
    """[s, PADDED] of one sequence [s]."""
    out = p.get("output_layer.weight", p["embedding.word_embeddings.weight"])
    return hidden(p, tokens) @ out.T


# -- rows ----------------------------------------------------------------------------------------
def _gradient(p: Parameters, batches: list[dict], divisor: float | None) -> Parameters:
    """Gradient of sum of losses / divisor; None: mean over sequences of their mean token loss."""
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total = (token_losses(p, batch["tokens"], batch["labels"]) * batch["loss_mask"]).sum()
        per = batch["loss_mask"].sum() * len(batches) if divisor is None else divisor
        loss = loss + total / per
    gradients = torch.autograd.grad(loss, list(p.values()), allow_unused=True)
    return {
        name: torch.zeros_like(v) if g is None else g
        for (name, v), g in zip(p.items(), gradients)
    }


def rows(layout: Layout, p: Parameters, step: int) -> tuple[list[Parameters], Parameters]:
    """The M general rows, whose mean is the standard gradient, and the target gradient."""
    full = layout.full_masks
    data = [
        [_data.sequence("general", step, row, n, full) for n in range(layout.sequences)]
        for row in range(layout.rows)
    ]
    if layout.domains:  # a row is the mean gradient of a domain's sequences
        by_domain: list[list[dict]] = [[] for _ in range(layout.domains)]
        for row, batches in enumerate(data):
            for n, batch in enumerate(batches):
                by_domain[(row + n) % layout.domains].append(batch)
        data = by_domain
    target = targets(layout, step)
    t = {k: torch.zeros_like(v.detach()) for k, v in p.items()}
    if target:
        t = _gradient(p, target, _tokens(target, layout))
    if layout.domains:
        return [_gradient(p, row, _tokens(row, layout)) for row in data], t
    tokens = _tokens([b for row in data for b in row], layout)
    divisor = None if tokens is None else tokens / len(data)
    return [_gradient(p, row, divisor) for row in data], t


def targets(layout: Layout, step: int) -> list[dict]:
    return [
        _data.sequence("target", step, 0, n, layout.full_masks) for n in range(layout.targets)
    ]


def _tokens(batches: list[dict], layout: Layout) -> float | None:
    """What a sum of losses is divided by where Megatron normalises per token."""
    return float(sum(b["loss_mask"].sum() for b in batches)) if layout.per_token else None


# -- the projection ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Problem:
    """What is solved: the names as in DRConfig."""

    set: str = "cone"
    fraction: float = 0.5
    ridge: float = 0.3
    radius: float = 0.5
    alpha: float = 0.1
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


def solve(problem: Problem, j: np.ndarray, t: np.ndarray) -> np.ndarray:
    """argmin_w 1/2 |J^T w - t|^2 + (rho/2) tr(G)/M |w - 1/M|^2 over the set; J [M, N]."""
    m = len(j)
    mean = np.full(m, 1.0 / m)
    if problem.set == "mean":
        return mean
    if problem.set == "target":
        return np.zeros(m)
    if problem.set in ("topk", "greedy"):
        k = max(1, round(problem.fraction * m))
        chosen: list[int] = []
        while len(chosen) < k:
            others = [i for i in range(m) if i not in chosen]
            if problem.set == "topk":
                chosen.append(max(others, key=lambda i: j[i] @ t))
            else:
                chosen.append(
                    min(others, key=lambda i: np.sum((j[chosen + [i]].sum(0) / k - t) ** 2))  # noqa: B023
                )
        return np.isin(np.arange(m), chosen) / k
    if problem.set == "filter":
        order = np.argsort(j @ t)
        dropped = order[: round(problem.fraction * np.sum(j @ t < 0))]
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
    for name in sorted({block(n, problem.blocks) for n in t}):
        members = [n for n in t if block(n, problem.blocks) == name]
        flat = lambda g: torch.cat([g[n].reshape(-1) for n in members]).numpy()  # noqa: B023, E731
        j, target = np.stack([flat(g) for g in general]), flat(t)
        seen = np.vstack([j, target])  # what the plugin multiplies: whole rows, or sketches
        if problem.gram == "sketch":
            seen = _sketch(problem, [{n: g[n] for n in members} for g in [*general, t]], step)
        w = solve(problem, seen[:-1], seen[-1])
        own = 1.0 if problem.set in ("target", "halfspace") else 0.0
        d, seen_d = j.T @ w + own * target, seen[:-1].T @ w + own * seen[-1]
        length = np.linalg.norm(seen_d)
        if problem.norm != "none" and length > 0:
            wanted = seen[:-1].mean(0) if problem.norm == "general" else seen[-1]
            d = d * np.linalg.norm(wanted) / length
        d = torch.from_numpy((1 - alpha) * d + alpha * target)
        weights[name] = w
        for n, part in zip(members, d.split([t[n].numel() for n in members])):
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


def _sketch(problem: Problem, vectors: list[Parameters], step: int) -> np.ndarray:
    """CountSketches of dense gradients: the same function that the ranks apply to their pieces."""
    sketch = CountSketch(problem.sketch_size, problem.seed * 1_000_003 + step)
    out = torch.zeros(len(vectors), problem.sketch_size, dtype=torch.float64)
    for name in vectors[0]:
        values = torch.stack([v[name].reshape(-1) for v in vectors])
        sketch.add_(out, values, torch.arange(values.shape[1]), key_of(name))
    return out.numpy()


def train(
    layout: Layout, problem: Problem, steps: int, learning_rate: float, clip: float, eps: float
) -> tuple[Parameters, list[dict[str, np.ndarray]]]:
    """Parameters after `steps` of clipped AdamW without decay, and each step's weights."""
    p = {k: v.double().requires_grad_() for k, v in initial(layout).items()}
    optimizer = torch.optim.AdamW(p.values(), lr=learning_rate, eps=eps, weight_decay=0.0,
                                  betas=(0.9, 0.999))  # fmt: skip
    history = []
    for step in range(steps):
        update, weights = project(problem, *rows(layout, p, step), step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in p.items():
            value.grad = update[name] * min(1.0, clip / (norm + 1e-6))
        optimizer.step()
        history.append(weights)
    return {k: v.detach() for k, v in p.items()}, history
