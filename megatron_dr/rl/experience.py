"""A rollout as tensors to train on, its order, and its file.

Shape suffixes: N completions, B completions of a microbatch, T tokens of a sequence, A: T, or 1
for what all tokens of a completion share.
"""

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
from megatron_dr.rl.losses import KLEstimator, kl_estimates
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
        advantage_NA: what log-probabilities are multiplied by.
        statistics: of the rollout, by their names in the log.
        value_NT: PPO: returns that the value head predicted before the next token.
        return_NT: PPO: what it should have predicted; NaN where it is not to learn it: of a
            target, and where the reward function failed.
    """

    number: int
    tokens_NT: Tensor
    mask_NT: Tensor
    old_NT: Tensor
    reference_NT: Tensor
    reward_N: Tensor
    advantage_NA: Tensor
    statistics: dict[str, float]
    value_NT: Tensor | None = None
    return_NT: Tensor | None = None

    def by_reward(self) -> "Experience":
        """The same with rewards, normalised in the whole rollout, in the advantages' place."""
        return replace(self, advantage_NA=normalised(self.reward_N)[:, None])

    def kl_N(self, estimator: KLEstimator) -> Tensor:
        """The estimate of the KL to the reference of each completion, in nats."""
        d_NT = (self.reference_NT - self.old_NT).double()
        return kl_estimates(torch.where(self.mask_NT.bool(), d_NT, 0.0), estimator).sum(1)

    def without_returns(self) -> "Experience":
        """The same for a target: its loss has no value part."""
        if self.return_NT is None:
            return self
        return replace(self, return_NT=torch.full_like(self.return_NT, torch.nan))

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def batch(
        self, numbers: Sequence[int], aggregation: Aggregation, plain: bool
    ) -> dict[str, Tensor]:
        """A microbatch: [B, T] each, or [B, 1] for what belongs to a completion.

        `loss_mask` is what a token counts in the mean's denominator, `weight` in its sum. With
        PPO's values there are `value` and `return`, too.

        Args:
            plain: whether the loss is `gradient_loss`, not the policy's with its ratio.
        """
        rows = torch.tensor(list(numbers))
        tokens_BT = self.tokens_NT[rows].long()
        weights = token_weights(self.mask_NT[rows], aggregation)
        length = tokens_BT.shape[1]
        values = {"value": self.value_NT, "return": self.return_NT}
        return {  # the last label is masked
            "tokens": tokens_BT, "labels": tokens_BT.roll(-1, 1),
            "position_ids": torch.arange(length).expand_as(tokens_BT).contiguous(),
            "loss_mask": weights.count_BT, "weight": weights.weight_BT,
            "old_log_prob": self.old_NT[rows], "reference_log_prob": self.reference_NT[rows],
            "advantage": self.advantage_NA[rows].expand(-1, length).contiguous(),
            "plain": torch.full((len(rows), 1), plain),
            **{name: value_NT[rows] for name, value_NT in values.items() if value_NT is not None},
        }  # fmt: skip


class ExperienceStream:
    """An endless iterator over a data rank's microbatches of an experience.

    Microbatch m of a step takes consecutive positions of the epoch order, data ranks side by side,
    so that the sequences of a step do not depend on the number of ranks.

    Weights and counts of a step are in units in which the counts add up to all tokens of its
    sequences, padding too: a mean is the same in any unit, and the routers of experts weigh their
    auxiliary losses by all tokens.

    Args:
        batch_size: sequences of a step, on all ranks together.

    Attributes:
        consumed: sequences taken by all ranks together: the stream's place, which can be set.
    """

    def __init__(
        self, *, micro_batch_size: int, rank: int, size: int, batch_size: int,
        aggregation: Aggregation, plain: bool,
    ) -> None:  # fmt: skip
        self.micro_batch_size, self.rank, self.size = micro_batch_size, rank, size
        self.batch_size = batch_size
        self.aggregation, self.plain = aggregation, plain
        self.consumed = 0
        self._experience: Experience | None = None
        self._units: dict[int, float] = {}  # by the first sequence of a step

    def show(self, experience: Experience, seed: int) -> None:
        """Go on with this experience, in an order by `seed` and its number."""
        self._experience = experience
        mixed = (seed * 1_000_003 + experience.number) % 2**63
        self._order = EpochOrder(len(experience), mixed)
        self._count_N = token_weights(experience.mask_NT, self.aggregation).count_BT.sum(1)
        self._units.clear()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        assert self._experience is not None
        first = self.consumed + self.rank * self.micro_batch_size
        numbers = [self._order[first + n] for n in range(self.micro_batch_size)]
        batch = self._experience.batch(numbers, self.aggregation, self.plain)
        unit = self._unit(self.consumed - self.consumed % self.batch_size)
        self.consumed += self.micro_batch_size * self.size
        return batch | {name: batch[name] * unit for name in ("weight", "loss_mask")}

    def _unit(self, first: int) -> float:
        """All tokens of the step from this place on by what counts among them."""
        if first not in self._units:
            assert self._experience is not None
            numbers = [self._order[first + n] for n in range(self.batch_size)]
            tokens = self._experience.tokens_NT[numbers].numel()
            self._units = {first: tokens / max(int(self._count_N[numbers].sum()), 1)}
        return self._units[first]


_TENSORS = ("tokens_NT", "mask_NT", "old_NT", "reference_NT", "reward_N", "advantage_NA")
_OF_PPO = ("value_NT", "return_NT")


def save(path: Path, experiences: dict[str, Experience], state: dict[str, float]) -> None:
    """Write experiences by role to one file, which is there whole or not at all.

    Args:
        state: of what makes the next ones.
    """
    tensors, about = {}, {}
    for role, experience in experiences.items():
        for name in (*_TENSORS, *_OF_PPO):
            if getattr(experience, name) is not None:
                tensors[f"{role}.{name}"] = getattr(experience, name).contiguous()
        about[role] = {"number": experience.number, "statistics": experience.statistics}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    metadata = {"experiences": json.dumps(about), "state": json.dumps(state)}
    save_file(tensors, partial, metadata=metadata)
    os.replace(partial, path)


def load(path: Path) -> tuple[dict[str, Experience], dict[str, float]]:
    """The experiences and the state that `save` wrote.

    Raises:
        ValueError: no such file, or one that can't be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, keys, found = file.metadata() or {}, set(file.keys()), {}
            for role, about in json.loads(metadata["experiences"]).items():
                names = [*_TENSORS, *(n for n in _OF_PPO if f"{role}.{n}" in keys)]
                tensors = {name: file.get_tensor(f"{role}.{name}") for name in names}
                found[role] = Experience(
                    number=about["number"], statistics=about["statistics"], **tensors
                )
            return found, json.loads(metadata["state"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the checkpoint's rollout can't be read ({error}).") from None
