"""The oracle: one process, plain PyTorch, float64, dense rows. Obviously correct, but slow.

Nothing here imports Megatron, and of the plugin only the sketch's hash: the model is written out by
the names of Megatron's parameters, and `_problem` solves the feasible sets by scipy on dense rows.
"""

import math

import numpy as np
import torch

from . import _data
from ._data import Layout
from ._problem import Parameters, Problem, project, sketch_error

HIDDEN, HEADS, GROUPS, HEAD, FFN, LAYERS = 32, 4, 2, 8, 48, 4
EXPERTS, EXPERT_FFN, PADDED = 4, 24, 64


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
    trained = {name: v for name, v in p.items() if v.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(v) if g is None else g
        for (name, v), g in zip(trained.items(), gradients, strict=True)
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
    t = {k: torch.zeros_like(v.detach()) for k, v in p.items() if v.requires_grad}
    if target:
        t = _target(layout, p, target)
    if layout.domains:
        return [_gradient(p, row, _tokens(row, layout)) for row in data], t
    tokens = _tokens([b for row in data for b in row], layout)
    divisor = None if tokens is None else tokens / len(data)
    return [_gradient(p, row, divisor) for row in data], t


def target_sets(layout: Layout, target: list[dict]) -> list[tuple[float, list[dict]]]:
    """The sets of a step's targets, each with its weight in t."""
    if not layout.target_sets:
        return [(1.0, target)]
    own: list[list[dict]] = [[] for _ in _data.SET_WEIGHTS]
    for n, one in enumerate(target):
        own[layout.target_sets[n % len(layout.target_sets)]].append(one)
    return list(zip(_data.SET_WEIGHTS, own, strict=True))


def _target(layout: Layout, p: Parameters, target: list[dict]) -> Parameters:
    """The target's gradient; of several sets their own gradients' mean by weight."""
    sets = target_sets(layout, target)
    each = [_gradient(p, own, _tokens(own, layout)) for _, own in sets]
    weights = nearest_to_zero(*each) if layout.maximin else [weight for weight, _ in sets]
    return {name: sum(w * t[name] for w, t in zip(weights, each, strict=True)) for name in each[0]}


def nearest_to_zero(a: Parameters, b: Parameters) -> tuple[float, float]:
    """Weights of the point between two gradients that is nearest to 0."""
    dot = lambda x, y: sum(float((x[name] * y[name]).sum()) for name in x)  # noqa: E731
    apart = {name: a[name] - b[name] for name in a}
    of_a = min(1.0, max(0.0, -dot(b, apart) / dot(apart, apart)))
    return of_a, 1.0 - of_a


def targets(layout: Layout, step: int) -> list[dict]:
    return [_data.sequence("target", step, 0, n, layout.full_masks) for n in range(layout.targets)]


def _tokens(batches: list[dict], layout: Layout) -> float | None:
    """What a sum of losses is divided by where Megatron normalises per token."""
    return float(sum(b["loss_mask"].sum() for b in batches)) if layout.per_token else None


def train(
    layout: Layout, problem: Problem, steps: int, learning_rate: float, clip: float, eps: float
) -> tuple[Parameters, list[dict[str, np.ndarray]], list[float]]:
    """Parameters after `steps` of clipped AdamW without decay; each step's weights and, of a
    sketched gram, its estimated error."""
    p = {k: v.double().requires_grad_(layout.trains(k)) for k, v in initial(layout).items()}
    trained = {k: v for k, v in p.items() if v.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=learning_rate, eps=eps, weight_decay=0.0,
                                  betas=(0.9, 0.999))  # fmt: skip
    history, errors = [], []
    for step in range(steps):
        general, target = rows(layout, p, step)
        update, weights = project(problem, general, target, step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in trained.items():
            value.grad = update[name] * min(1.0, clip / (norm + 1e-6))
        optimizer.step()
        history.append(weights)
        if problem.gram == "sketch":
            errors.append(sketch_error(problem, general, target, step))
    return {k: v.detach() for k, v in trained.items()}, history, errors
