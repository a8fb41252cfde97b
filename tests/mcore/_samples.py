"""Sample rows on Megatron's model in a layout, and the oracle: a loop over samples, plain PyTorch.

A step has `dp` ranks x MICROBATCHES general microbatches of SAMPLES sequences, and target ones of
TARGETS sequences, either by themselves or at the end of each general one.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import packed
from megatron_dr.projection.kronecker import Kronecker

from . import _data, _megatron, _oracle
from ._data import Layout
from ._oracle import Parameters, Problem

MICROBATCHES, SAMPLES, TARGETS = 2, 3, 2


@dataclass(frozen=True)
class Case:
    """How samples are weighed: names as in DRConfig."""

    set: str = "topk"
    fraction: float = 0.5
    alpha: float = 0.1
    norm: str = "tokens"
    blocks: str = "matrix"
    score: str = "exact"
    window: str = "microbatch"
    target_pass: str = "own"
    passes: int = 1
    target_refresh: int = 1
    kronecker_out: int = 6
    kronecker_in: int = 5
    seed: int = 3


def batch(layout: Layout, role: str, step: int, rank: int, number: int, samples: int) -> dict:
    row = rank * MICROBATCHES + number
    if layout.packed:  # packs of different numbers of samples
        samples = 2 + (row + step) % 2
    sequences = [
        _data.sequence(role, step, row, n, layout.full_masks) for n in range(samples)
    ]
    return {key: torch.stack([s[key] for s in sequences]) for key in sequences[0]}


# -- Megatron --------------------------------------------------------------------------------------
def forward_step(data_iterator: Any, model: Any) -> Any:
    data = next(data_iterator)
    if "cu_seqlens" in data:
        output = model(data["tokens"], data["position_ids"], None, labels=data["labels"],
                       packed_seq_params=packed.parameters(data))  # fmt: skip
        return output, partial(_megatron.loss_func, data["loss_mask"])
    data["attention_mask"] = None
    group = parallel_state.get_context_parallel_group()
    data = get_batch_on_this_cp_rank(data, is_hybrid_cp=False, cp_group=group)
    output = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
    return output, partial(_megatron.loss_func, data["loss_mask"])


def train(layout: Layout, case: Case, steps: int, initial: Parameters) -> Any:
    """On a rank: parameters' pieces and the log's values of each step."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, initial)
    dr = DRConfig(rows="sample", packed=layout.packed, **vars(case))
    handle = megatron_dr.attach(model, optimizer, config, dr)
    size, length = (1, _data.PACK) if layout.packed else (SAMPLES, _data.LENGTH)
    rank, function, log = parallel_state.get_data_parallel_rank(), get_forward_backward_func(), []
    for step in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        general = [batch(layout, "general", step, rank, n, SAMPLES) for n in range(MICROBATCHES)]
        wanted = MICROBATCHES if step % case.target_refresh == 0 else 0
        target = [batch(layout, "target", step, rank, n, TARGETS) for n in range(wanted)]
        if case.target_pass == "own":  # Megatron's schedules have one microbatch size
            target = [batch(layout, "target", step, rank, n, SAMPLES) for n in range(wanted)]
        if layout.packed:
            general, target = ([_data.pack(b) for b in role] for role in (general, target))
        iterators = [[iter(b) for _ in model] for b in (general, target)]
        g, t = iterators if layout.vpp else [i[0] for i in iterators]
        reports = handle.step(
            function, forward_step_func=forward_step, data_iterator=g,
            model=model if layout.vpp else model[0], num_microbatches=MICROBATCHES,
            seq_length=length, micro_batch_size=size, forward_only=False,
            target_data_iterator=t, num_target_microbatches=wanted,
            target_micro_batch_size=TARGETS if case.target_pass == "merged" else size,
        )  # fmt: skip
        log.append([{k: v.tolist() for k, v in r.items()} for r in reports])
        optimizer.step()
    if layout.overlap_param_gather:
        for chunk in model:
            chunk.disable_forward_pre_hook()
    return _megatron.pieces(model, config), log


# -- the oracle ------------------------------------------------------------------------------------
def _sample_gradients(p: Parameters, data: dict) -> tuple[list[Parameters], np.ndarray]:
    """Each sample's summed token-loss gradient U, and its tokens."""
    out = []
    for n in range(len(data["tokens"])):
        losses = _oracle.token_losses(p, data["tokens"][n], data["labels"][n])
        gradients = torch.autograd.grad((losses * data["loss_mask"][n]).sum(), list(p.values()))
        out.append(dict(zip(p, (g.detach() for g in gradients))))
    return out, data["loss_mask"].sum(1).double().numpy()


def _mix(samples: list[Parameters], factors: Any) -> Parameters:
    return {k: sum(f * s[k] for f, s in zip(factors, samples)) for k in samples[0]}


class Oracle:
    """Keeps what a run keeps between steps: a cached target and running thresholds."""

    def __init__(self, layout: Layout, case: Case) -> None:
        self.layout, self.case = layout, case
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
        mean_t = self._mean([part for rank in target for part in rank])
        windows = []  # (share of the gradient, rows, their tokens, target, rank)
        if case.window == "step":
            rows, counts = [], []
            for rank in general:
                for samples, own in rank:
                    rows += [_mix([s], [self._share(own, tokens) / own.sum()]) for s in samples]
                    counts += list(own)
            rows = [_mix([row], [len(rows)]) for row in rows]
            windows.append((1.0, rows, np.array(counts), mean_t, 0))
        else:
            for r in ranks:
                for n in numbers:
                    samples, own = general[r][n]
                    share = self._share(own, tokens)
                    rows = [_mix([s], [len(samples) / own.sum()]) for s in samples]
                    t = self._mean([target[r][n]]) if merged else mean_t
                    windows.append((share, rows, own, t, r))
        total = {k: torch.zeros_like(v.detach()) for k, v in p.items()}
        for share, rows, own, t, rank in windows:
            for name, value in self._project(rows, own, t, rank).items():
                total[name] += share * value
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

    def _project(
        self, rows: list[Parameters], own: np.ndarray, t: Parameters, rank: int
    ) -> Parameters:
        case, update = self.case, {}
        problem = Problem(set=case.set, fraction=case.fraction, blocks=case.blocks)
        for block in sorted({_oracle.block(n, case.blocks) for n in t}):
            members = [n for n in t if _oracle.block(n, case.blocks) == block]
            flat = lambda g: torch.cat([g[n].reshape(-1) for n in members]).numpy()  # noqa: B023, E731
            j, target = np.stack([flat(g) for g in rows]), flat(t)
            seen_j = np.stack([self._seen(g, members) for g in rows])
            seen_t = self._seen(t, members)
            if case.window == "streaming":
                w = self._streamed(block, seen_j @ seen_t / (seen_t @ seen_t), rank)
            else:
                w = _oracle.solve(problem, seen_j, seen_t)
            helper = 1.0 if case.set in ("target", "halfspace") else 0.0
            alpha = 1.0 if case.set == "target" else case.alpha
            scale = self._scale(seen_j, seen_t, w, helper, own)
            d = (1 - alpha) * scale * (j.T @ w + helper * target) + alpha * target
            sizes = [t[n].numel() for n in members]
            for name, part in zip(members, torch.from_numpy(d).split(sizes)):
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
        sides = [f(None, "cpu", torch.float64) for f in (sketch.out_columns, sketch.in_columns)]
        p_out, p_in = (torch.eye(n).double() if s is None else s for s, n in zip(sides, g.shape))
        return p_out @ g @ p_in.T


def oracle(layout: Layout, case: Case, steps: int) -> Parameters:
    """Parameters after steps of clipped AdamW."""
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(layout).items()}
    optimizer = torch.optim.AdamW(p.values(), lr=_megatron.LEARNING_RATE, eps=_megatron.EPS,
                                  weight_decay=0.0, betas=(0.9, 0.999))  # fmt: skip
    state = Oracle(layout, case)
    for step in range(steps):
        update = state.update(p, step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in p.items():
            value.grad = update[name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
    return {k: v.detach() for k, v in p.items()}


__all__ = ["Case", "oracle", "replace", "train"]
