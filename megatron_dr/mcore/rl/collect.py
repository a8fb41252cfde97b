"""Collecting experience: completions, rewards, advantages and log-probabilities."""

import atexit
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from megatron.core import parallel_state

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore.collectives import of_all_ranks
from megatron_dr.mcore.rl.reference_policy import Reference
from megatron_dr.mcore.rl.scorers import open_scorers, score
from megatron_dr.mcore.rollouts.engine import open_rollouts
from megatron_dr.mcore.rollouts.passes import log_probs, log_probs_and_values
from megatron_dr.rl.advantages import group_advantages, normalised
from megatron_dr.rl.experience import Experience
from megatron_dr.rl.ppo import Estimator
from megatron_dr.rl.prompts import Prompt
from megatron_dr.rl.reward_pool import Sample
from megatron_dr.rl.rollouts import Completion, SamplingParams


class Collector:
    """The policy and the reward function as a source of experience; all calls are collective.

    Every rank gets the same experience, whole. Ranks that hold copies of the model share the work.

    Args:
        model: Megatron's list of model chunks.
        tokenizer: Megatron's.
        reference: the frozen reference; None without a KL.

    Attributes:
        estimator: of PPO's advantages; None with GRPO.

    Raises:
        ValueError: a layout in which rollouts don't run, or a reward function that can't be loaded.
    """

    def __init__(
        self, model: list[Any], tokenizer: Any, rl: RLConfig, args: Namespace,
        reference: Reference | None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.rl, self.args = model, tokenizer, rl, args
        self.reference = reference
        self.stop = () if rl.stop is None else (rl.stop,)
        self.estimator = Estimator(rl) if rl.algorithm == "ppo" else None
        self.rollouts = open_rollouts(model, tokenizer, args, rl.engine)
        self.scorers = open_scorers(rl)
        for scorer in self.scorers.values():
            atexit.register(scorer.close)

    def collect(
        self, prompts: Sequence[Prompt], number: int, role: str, by_reward: bool
    ) -> Experience:
        """`group` completions of each prompt, scored, with what their loss needs.

        Args:
            number: of the rollout, and with the role the seed of its draws.
            by_reward: whether the loss is of rewards, normalised in the whole batch; else
                advantages are normalised in each prompt's group, or PPO's.
        """
        group = self.rl.group
        repeated = [prompt for prompt in prompts for _ in range(group)]
        rl = self.rl
        sampling = SamplingParams(
            rl.max_tokens, rl.temperature, rl.top_p, self.stop, rl.top_k, rl.min_tokens
        )
        completions = self._complete(repeated, sampling, draw(self.args.seed, role, number))
        reward_N, statistics = self._rewards(repeated, completions, role)
        if by_reward:
            advantage_N = normalised(reward_N)
        else:
            of_prompt_N = torch.arange(len(repeated)) // group
            advantage_N = group_advantages(reward_N, of_prompt_N)
        tokens_NT, mask_NT = self._sequences(repeated, completions)
        forward = log_probs if self.estimator is None else log_probs_and_values
        found_NT = self._passed(forward, tokens_NT, mask_NT)
        old_NT, *values = (found_NT,) if self.estimator is None else found_NT.unbind(-1)
        reference_NT = torch.zeros_like(old_NT)
        if self.reference is not None:
            with self.reference.in_place():
                reference_NT = self._passed(log_probs, tokens_NT, mask_NT)
        experience = Experience(
            number, tokens_NT, _next(mask_NT), _next(old_NT), _next(reference_NT),
            reward_N.float(), advantage_N.float()[:, None], statistics,
        )  # fmt: skip
        if self.estimator is None:
            return experience
        return self.estimator.complete(experience, _next(values[0]), by_reward)

    def greedy_reward(self, prompts: Sequence[Prompt], role: str) -> float:
        """Mean reward, by the role's, of the likeliest completions; failed ones are left out."""
        sampling = SamplingParams(
            self.rl.max_tokens, temperature=0.0, stop=self.stop, min_tokens=self.rl.min_tokens
        )
        completions = self._complete(prompts, sampling, 0)
        return self._rewards(prompts, completions, role)[1]["reward"]

    def _complete(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, seed: int
    ) -> list[Completion]:
        return self.rollouts.generate(
            [prompt.tokens for prompt in prompts], sampling, seed, [p.origin for p in prompts]
        )

    def _text(self, completion: Completion) -> str:
        ids = list(completion.ids)
        if ids and ids[-1] == self.tokenizer.eod:
            ids.pop()
        text: str = self.tokenizer.detokenize(ids)
        return text

    def _rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], role: str
    ) -> tuple[torch.Tensor, dict[str, float]]:
        samples = [
            Sample(p.content, self._text(c), p.answer, p.origin)
            for p, c in zip(prompts, completions, strict=True)
        ]
        reward_N, failures = score(self.scorers[role], samples)
        scored_N = reward_N[~reward_N.isnan()]
        total = len(completions)
        return reward_N, {
            "reward": float(scored_N.mean()) if len(scored_N) else 0.0,
            "response length": sum(len(c.ids) for c in completions) / total,
            "truncated": sum(c.finish_reason == "length" for c in completions) / total,
            "failed rewards": float(sum(failures.values())),
        }

    def _sequences(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(prompts), self.args.seq_length)
        tokens_NT = torch.full(shape, self.tokenizer.eod, dtype=torch.int32)
        mask_NT = torch.zeros(shape, dtype=torch.uint8)
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            ids = [*prompt.tokens, *completion.ids]
            tokens_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
            mask_NT[row, len(prompt.tokens) : len(ids)] = 1
        return tokens_NT, mask_NT

    def _passed(
        self, forward: Callable[..., torch.Tensor], tokens_NT: torch.Tensor, mask_NT: torch.Tensor
    ) -> torch.Tensor:
        """What a pass gives for all rows, on the host: data ranks share them."""
        group = parallel_state.get_data_parallel_group()
        rank, size = group.rank(), group.size()
        rows = list(range(len(tokens_NT)))[rank::size] or [0]  # a rank without rows helps too
        own = forward(self.model, tokens_NT[rows].long(), mask_NT[rows], self.args.micro_batch_size)
        out = torch.zeros(*tokens_NT.shape, *own.shape[2:])
        for numbers, values in of_all_ranks((rows, own.cpu()), group):
            out[numbers] = values
        return out


def draw(seed: int, role: str, number: int) -> int:
    """The seed of a rollout's draws, below 2**64."""
    entropy = [seed, *role.encode(), number]
    return int(numpy.random.SeedSequence(entropy).generate_state(1, numpy.uint64)[0])


def _next(value_NT: torch.Tensor) -> torch.Tensor:
    """Values of the next token, 0 at the last."""
    return torch.nn.functional.pad(value_NT[:, 1:], (0, 1)).contiguous()
