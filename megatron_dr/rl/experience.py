"""A rollout as tensors to train on, its order, and its file.

Shape suffixes: N completions, B completions of a microbatch, T tokens of a sequence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_dr.data.order import EpochOrder
from megatron_dr.rl.advantages import normalised
from megatron_dr.rl.weights import Aggregation, token_weights


@dataclass(frozen=True)
class Experience:
    """Completions with their advantages; values by token stand at the token before.

    Attributes:
        number: of the rollout in the run.
        tokens_NT: prompts and completions, padded on the right.
        mask_NT: 1 where the next token belongs to the completion.
        old_NT: log-probability of the next token by the policy that wrote it.
        reference_NT: by the frozen reference; 0 without one.
        reward_N: NaN where the reward function failed.
        advantage_N: what a completion's log-probability is multiplied by.
        statistics: of the rollout, by their names in the log.
    """

    number: int
    tokens_NT: Tensor
    mask_NT: Tensor
    old_NT: Tensor
    reference_NT: Tensor
    reward_N: Tensor
    advantage_N: Tensor
    statistics: dict[str, float]

    def by_reward(self) -> Experience:
        """The same for `reward_loss`: with rewards that are normalised in the whole rollout."""
        return replace(self, advantage_N=normalised(self.reward_N))

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def batch(
        self, numbers: Sequence[int], aggregation: Aggregation, by_reward: bool
    ) -> dict[str, Tensor]:
        """A microbatch: [B, T] each, or [B, 1] for what belongs to a completion.

        `loss_mask` is what a token counts in the mean's denominator, `weight` in its sum.

        Args:
            by_reward: whether the loss is `reward_loss`, not the policy's.
        """
        rows = torch.tensor(list(numbers))
        tokens_BT = self.tokens_NT[rows].long()
        weights = token_weights(self.mask_NT[rows], aggregation)
        length = tokens_BT.shape[1]
        return {
            "tokens": tokens_BT,
            "labels": tokens_BT.roll(-1, 1),  # the last one is masked
            "position_ids": torch.arange(length).expand_as(tokens_BT).contiguous(),
            "loss_mask": weights.count_BT,
            "weight": weights.weight_BT,
            "old_log_prob": self.old_NT[rows],
            "reference_log_prob": self.reference_NT[rows],
            "advantage": self.advantage_N[rows][:, None],
            "by_reward": torch.full((len(rows), 1), by_reward),
        }


class ExperienceStream:
    """An endless iterator over a data rank's microbatches of an experience.

    Microbatch m of a step takes consecutive positions of the epoch order, data ranks side by side,
    so that the sequences of a step do not depend on the number of ranks.

    Attributes:
        consumed: sequences taken by all ranks together: the stream's place, which can be set.
    """

    def __init__(
        self, *, micro_batch_size: int, rank: int, size: int, aggregation: Aggregation,
        by_reward: bool,
    ) -> None:  # fmt: skip
        self.micro_batch_size, self.rank, self.size = micro_batch_size, rank, size
        self.aggregation, self.by_reward = aggregation, by_reward
        self.consumed = 0
        self._experience: Experience | None = None

    def show(self, experience: Experience, seed: int) -> None:
        """Go on with this experience, in an order by `seed` and its number."""
        self._experience = experience
        self._order = EpochOrder(len(experience), _mixed(seed, experience.number))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        assert self._experience is not None
        first = self.consumed + self.rank * self.micro_batch_size
        numbers = [self._order[first + n] for n in range(self.micro_batch_size)]
        self.consumed += self.micro_batch_size * self.size
        return self._experience.batch(numbers, self.aggregation, self.by_reward)


def _mixed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63


_TENSORS = ("tokens_NT", "mask_NT", "old_NT", "reference_NT", "reward_N", "advantage_N")


def save(path: Path, experiences: dict[str, Experience]) -> None:
    """Write experiences by role to one file, which is there whole or not at all."""
    tensors, about = {}, {}
    for role, experience in experiences.items():
        for name in _TENSORS:
            tensors[f"{role}.{name}"] = getattr(experience, name).contiguous()
        about[role] = {"number": experience.number, "statistics": experience.statistics}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"experiences": json.dumps(about)})
    os.replace(partial, path)


def load(path: Path) -> dict[str, Experience]:
    """What `save` wrote.

    Raises:
        ValueError: no such file, or one that can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["experiences"])
            return {
                role: Experience(
                    number=values["number"],
                    statistics=values["statistics"],
                    **{name: file.get_tensor(f"{role}.{name}") for name in _TENSORS},
                )
                for role, values in about.items()
            }
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the checkpoint's rollout can't be read ({error}).") from None
