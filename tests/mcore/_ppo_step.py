"""PPO's steps on a Megatron model with a value head, and plain loops in float64."""

import copy
import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.attach import attach
from megatron_dr.mcore.model.value_head import add_value_head
from megatron_dr.mcore.rl.forward import policy_step
from megatron_dr.mcore.rollouts.passes import log_probs_and_values
from megatron_dr.rl.experience import Experience, ExperienceStream
from megatron_dr.rl.ppo import Estimator

from . import _data, _megatron, _oracle, _problem
from ._data import Layout
from ._oracle import Parameters
from ._problem import Problem

LENGTH, STEPS, HEAD = 12, 2, "value_head."
RL = RLConfig(algorithm="ppo", reward="a:b", kl=0.3, value_weight=0.5, value_clip=0.4, group=1)
# prompt, completion, reward: one not scored, one without tokens
ROWS = [
    ([5, 1, 2], [7, 8, 9, 3], 1.0), ([5, 1, 2], [4], 0.0),
    ([7], [6, 6, 2, 50, 4, 3, 2, 1, 9, 8, 7], math.nan), ([7], [11, 12], 0.3),
    ([9, 8], [1, 2, 3], 0.5), ([60, 0, 3], [], 2.0), ([60, 0, 3], [15, 16], -1.0),
    ([2], [22, 21, 20, 19], 0.1),
]  # fmt: skip
TARGETS = [([4, 4], [8, 2, 1], 1.0), ([3], [2, 2], 0.2), ([1, 6], [9], -0.4), ([8], [5, 6], 0.0)]


def initial() -> Parameters:
    noise = torch.Generator().manual_seed(5)
    head = {HEAD + "weight": 0.3 * torch.randn(1, _oracle.HIDDEN, generator=noise),
            HEAD + "bias": torch.tensor([0.2])}  # fmt: skip
    return _oracle.initial(Layout()) | head


def predictions(p: Parameters, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the next token and value, of each token [n, s]."""
    log_probs, values = [], []
    for ids in tokens.long():
        h = _oracle.hidden(p, ids)
        found = (h @ p["output_layer.weight"].T).log_softmax(-1)
        log_probs.append(torch.stack([found[t, ids[(t + 1) % LENGTH]] for t in range(LENGTH)]))
        values.append(h @ p[HEAD + "weight"][0] + p[HEAD + "bias"])
    return torch.stack(log_probs), torch.stack(values)


def experience(rows: list[Any], seed: int) -> Experience:
    """Old predictions away from the policy's and the head's, so that the clips matter."""
    shape = (len(rows), LENGTH)
    tokens, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.uint8)
    for n, (prompt, completion, _) in enumerate(rows):
        ids = prompt + completion
        tokens[n, : len(ids)] = torch.tensor(ids)
        mask[n, len(prompt) - 1 : len(ids) - 1] = 1
    noise = torch.Generator().manual_seed(seed)
    old, value = predictions({k: v.double() for k, v in initial().items()}, tokens)
    old, reference, value = (
        (x + scale * torch.randn(shape, generator=noise)).float()
        for x, scale in ((old, 0.3), (old, 0.5), (value, 0.5))
    )
    reward = torch.tensor([r for *_, r in rows])
    made = Experience(0, tokens, mask, old, reference, reward, torch.zeros(len(rows), 1), {})
    return Estimator(RL).complete(made, value, by_reward=False)


GENERAL, BY_POLICY = experience(ROWS, 1), experience(TARGETS, 2).without_returns()
TARGET = BY_POLICY.by_reward()


# -- the oracle ----------------------------------------------------------------------------------
def losses(p: Parameters, known: Experience, n: int, plain: bool) -> dict[str, list[Any]]:
    """Of each token of completion n, by kind."""
    (log_prob,), (value,) = predictions(p, known.tokens_NT[n : n + 1])
    out: dict[str, list[Any]] = {"policy loss": [], "value loss": [], "kl": [], "clipped": []}
    for t in known.mask_NT[n].nonzero().flatten().tolist():
        a = float(known.advantage_NA[n].expand(LENGTH)[t])
        if plain:
            out["policy loss"].append(-a * log_prob[t])
            continue
        ratio = (log_prob[t] - float(known.old_NT[n, t])).exp()
        best = min(ratio * a, ratio.clamp(1 - RL.clip, 1 + RL.clip) * a, key=float)
        out["policy loss"].append(-best)
        out["clipped"].append(float(best != ratio * a))
        d = float(known.reference_NT[n, t]) - log_prob[t].detach()
        out["kl"].append(d.exp() - d - 1)
        if not math.isnan(known.reward_N[n]):
            old, wanted = float(known.value_NT[n, t]), float(known.return_NT[n, t])
            near = old + (value[t] - old).clamp(-RL.value_clip, RL.value_clip)
            worst = max((value[t] - wanted) ** 2, (near - wanted) ** 2, key=float)
            out["value loss"].append(worst / 2)
    return out


def gradient(
    p: Parameters, known: Experience, rows: list[int], plain: bool, count: float
) -> Parameters:
    loss = torch.zeros([], dtype=torch.float64)
    for n in rows:
        found = losses(p, known, n, plain)
        loss = loss + sum(found["policy loss"]) + RL.value_weight * sum(found["value loss"])
    if not loss.requires_grad:
        return {name: torch.zeros_like(v) for name, v in p.items()}
    parts = torch.autograd.grad(loss / count, list(p.values()), allow_unused=True)
    return {
        n: torch.zeros_like(v) if g is None else g
        for (n, v), g in zip(p.items(), parts, strict=True)
    }


def expected(problem: Problem) -> tuple[Parameters, list[Parameters], dict[str, float]]:
    """Parameters after the steps, the updates, and what the first step logs.

    Each completion is a row; the head gets the rows' mean, and has no part in the problem.
    """
    p = {k: v.double().requires_grad_() for k, v in initial().items()}
    optimizer = torch.optim.AdamW(p.values(), lr=_megatron.LEARNING_RATE, eps=_megatron.EPS,
                                  weight_decay=0.0)  # fmt: skip
    tokens, target_tokens = (int(e.mask_NT.sum()) for e in (GENERAL, TARGET))
    every = [losses(p, GENERAL, n, False) for n in range(len(ROWS))]
    logged = {
        name: float(sum(sum(row[name]) for row in every)) / tokens
        for name in ("policy loss", "value loss", "kl", "clipped")
    }
    updates = []
    for step in range(STEPS):
        rows = [gradient(p, GENERAL, [n], False, tokens / len(ROWS)) for n in range(len(ROWS))]
        t = gradient(p, TARGET, [*range(len(TARGETS))], True, target_tokens)
        assert not any(v.any() for name, v in t.items() if name.startswith(HEAD))
        mean = {name: sum(row[name] for row in rows) / len(rows) for name in p}
        head = [name for name in p if name.startswith(HEAD)]
        policy = [{k: v for k, v in g.items() if k not in head} for g in (*rows, t)]
        update, _ = _problem.project(problem, policy[:-1], policy[-1], step)
        updates.append(update | {name: mean[name] for name in head})
        norm = math.sqrt(sum(float(u.square().sum()) for u in updates[-1].values()))
        for name, value in p.items():
            value.grad = updates[-1][name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
    return {k: v.detach() for k, v in p.items()}, updates, logged


# -- Megatron ------------------------------------------------------------------------------------
def with_head() -> None:
    """On a rank: models that `_megatron.build` makes get a head before DDP wraps them."""
    stock = _megatron.load

    def load(model: list[Any], config: Any, start: Parameters) -> None:
        add_value_head(model)
        stock(model, config, start)

    _megatron.load, _data.LENGTH = load, LENGTH


def stream(known: Experience, plain: bool, size: int = 1) -> ExperienceStream:
    out = ExperienceStream(
        micro_batch_size=size, rank=parallel_state.get_data_parallel_rank(),
        size=parallel_state.get_data_parallel_world_size(), batch_size=len(known),
        aggregation="token", plain=plain,
    )  # fmt: skip
    out.show(known, 3)
    return out


def train(layout: Layout, dr: DRConfig, steps: int, size: int = 1, loss: str = "reward") -> Any:
    """On a rank: first predictions, reports, the gradient of the first step and the parameters.

    `loss` is the target's.
    """
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, initial())
    dp = parallel_state.get_data_parallel_world_size()
    mask = torch.nn.functional.pad(GENERAL.mask_NT[:, :-1], (1, 0))
    found = log_probs_and_values(model, GENERAL.tokens_NT.long(), mask, 2)
    handle = attach(model, optimizer, config, dr)
    general = [stream(GENERAL, False, size) for _ in model]
    known = TARGET if loss == "reward" else BY_POLICY
    target = [stream(known, loss != "train-loss") for _ in model]
    for step in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = handle.step(
            get_forward_backward_func(), target_data_iterator=target if layout.vpp else target[0],
            num_target_microbatches=len(TARGETS) // dp, target_micro_batch_size=1,
            forward_step_func=partial(policy_step, RL),
            data_iterator=general if layout.vpp else general[0],
            model=model if layout.vpp else model[0], num_microbatches=len(ROWS) // dp // size,
            seq_length=LENGTH, micro_batch_size=size, forward_only=False,
        )  # fmt: skip
        if step == 0:
            first = reports
            gradients = copy.deepcopy(_megatron.pieces(model, config, "main_grad"))
        optimizer.step()
    parameters = _megatron.pieces(model, config)
    parallel_state.destroy_model_parallel()
    return found, first, gradients, parameters
