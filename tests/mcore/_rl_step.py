"""One GRPO step on a Megatron model, and plain loops over completions in float64."""

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.rl.forward import policy_step
from megatron_dr.rl.advantages import group_advantages
from megatron_dr.rl.experience import Experience, ExperienceStream

from . import _data, _megatron, _oracle
from ._data import Layout

LENGTH, CLIP, KL = 12, 0.2, 0.3
RL = RLConfig(reward="a:b", clip=CLIP, kl=KL)
# prompt, completion, reward: groups of two; one not scored, one equal pair, one without tokens
ROWS = [
    ([5, 1, 2], [7, 8, 9, 3], 1.0), ([5, 1, 2], [4], 0.0),
    ([7], [6, 6, 2, 50, 4, 3, 2, 1, 9, 8, 7], math.nan), ([7], [11, 12], 0.3),
    ([9, 8], [1, 2, 3], 0.5), ([9, 8], [20], 0.5),
    ([60, 0, 3], [], 2.0), ([60, 0, 3], [15, 16], -1.0),
]  # fmt: skip


def experience(p: dict[str, torch.Tensor]) -> Experience:
    """Old and reference log-probabilities away from the policy's, so that the clip matters."""
    shape = (len(ROWS), LENGTH)
    tokens, mask = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.uint8)
    for n, (prompt, completion, _) in enumerate(ROWS):
        ids = prompt + completion
        tokens[n, : len(ids)] = torch.tensor(ids)
        mask[n, len(prompt) - 1 : len(ids) - 1] = 1
    noise = torch.Generator().manual_seed(1)
    old = log_probs(p, tokens).detach() + 0.3 * torch.randn(shape, generator=noise)
    reference = old + 0.5 * torch.randn(shape, generator=noise)
    reward = torch.tensor([r for *_, r in ROWS])
    advantage = group_advantages(reward, torch.arange(len(ROWS)) // 2)
    advantage = advantage[:, None]
    return Experience(0, tokens, mask, old.float(), reference.float(), reward, advantage, {})


def log_probs(p: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    rows = []
    for ids in tokens.long():
        found = _oracle.logits(p, ids).log_softmax(-1)
        rows.append(torch.stack([found[t, ids[(t + 1) % LENGTH]] for t in range(LENGTH)]))
    return torch.stack(rows)


def expected(aggregation: str, by_reward: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, one token after the other."""
    layout = Layout(per_token=True)
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(layout).items()}
    known = experience(p)
    found, total, count = log_probs(p, known.tokens_NT), torch.zeros([]).double(), 0
    for n, (prompt, completion, _) in enumerate(ROWS):
        losses = []
        for t in range(len(prompt) - 1, len(prompt) + len(completion) - 1):
            a = float(known.advantage_NA[n])
            if by_reward:
                losses.append(-a * found[n, t])
                continue
            ratio = (found[n, t] - float(known.old_NT[n, t])).exp()
            best = min(ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a, key=float)
            d = float(known.reference_NT[n, t]) - found[n, t]
            losses.append(-best + KL * (d.exp() - d - 1))
        if losses:
            total = total + sum(losses) / (len(losses) if aggregation == "sequence" else 1)
            count += 1 if aggregation == "sequence" else len(losses)
    loss = total / count
    return float(loss), dict(zip(p, torch.autograd.grad(loss, list(p.values())), strict=True))


def step(layout: Layout, aggregation: Any, by_reward: bool) -> Any:
    """On a rank: the microbatches' reports, and the reduced gradient's pieces."""
    _data.LENGTH = LENGTH
    _megatron.initialize(layout)
    initial = _oracle.initial(layout)
    model, _, config = _megatron.build(layout, initial)
    model[0].zero_grad_buffer()
    size = parallel_state.get_data_parallel_world_size()
    stream = ExperienceStream(
        micro_batch_size=2, rank=parallel_state.get_data_parallel_rank(), size=size,
        batch_size=len(ROWS), aggregation=aggregation, plain=by_reward,
    )  # fmt: skip
    stream.show(experience({k: v.double() for k, v in initial.items()}), 3)
    reports = get_forward_backward_func()(
        forward_step_func=partial(policy_step, RL), data_iterator=stream, model=model[0],
        num_microbatches=len(ROWS) // 2 // size, seq_length=LENGTH, micro_batch_size=2,
        forward_only=False,
    )  # fmt: skip
    return reports, _megatron.pieces(model, config, "main_grad")
