"""Several target sets in one target gradient: t = sum_k w_k t_k, the weights w_k summing to 1.

t_k is the mean gradient of set k by itself: over its n_k of a step's n target microbatches or, with
a per-token loss, over its T_k of the T target tokens. Microbatches add up in one gradient, which is
then divided by n, or T. So the loss of a microbatch of set k is multiplied by

    w_k n / n_k ,   or with a per-token loss   w_k T / T_k

before its backward, and so are the losses that Megatron adds in there beside it: those of routers,
of multi-token prediction and of attention's indexer. What is reported is as it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossAutoScaler
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_dr.mcore import collectives, compat, constants

_BESIDE = (MoEAuxLossAutoScaler, MTPLossAutoScaler, DSAIndexerLossAutoScaler)
_SCALE = "main_loss_backward_scale"


@dataclass(frozen=True)
class TargetSets:
    """The target sets of a step.

    Attributes:
        names: of the sets, as the log has them.
        weights: w_k.
        of: the number of the set of each target microbatch of a rank; on every rank the same.

    Raises:
        ValueError: weights that don't sum to 1, or a set without a microbatch.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    of: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.weights) or abs(sum(self.weights) - 1.0) > 1e-9:
            raise ValueError(
                f"the weights of target sets sum to 1, one of each of {', '.join(self.names)}, not "
                f"{', '.join(map(str, self.weights))}."
            )
        if set(self.of) != set(range(len(self.names))):
            raise ValueError(
                f"each of the target sets {', '.join(self.names)} needs a microbatch in a step, "
                f"but these are of sets number {', '.join(map(str, self.of))}."
            )

    @property
    def halves_alike(self) -> bool:
        """Whether the first half of the microbatches has as many of each set as the second."""
        half = len(self.of) // 2
        return len(self.of) % 2 == 0 and sorted(self.of[:half]) == sorted(self.of[half:])

    def scales(self, tokens_n: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """What each microbatch's loss is multiplied by, float32 [n]; with tokens collective.

        Args:
            tokens_n: with a per-token loss, of this rank's microbatches, float64; zeros where it
                runs none.
        """
        of_n = constants.index(self.of, device)
        amount_n = torch.ones(len(self.of), dtype=torch.float64, device=device)
        amount_n = amount_n if tokens_n is None else tokens_n
        amount_K = amount_n.new_zeros(len(self.names)).index_add_(0, of_n, amount_n)
        if tokens_n is not None:
            collectives.all_reduce(amount_K, parallel_state.get_data_parallel_group())
        weight_K = torch.stack([constants.scalar(weight, device) for weight in self.weights])
        scale_K = weight_K * amount_K.sum() / amount_K.clamp(min=1)
        return scale_K[of_n].float()


def read(data: Any, number: int) -> list[list[dict[str, Any]] | None]:
    """So many microbatches of each model chunk; None where this rank reads none."""
    per_chunk = data if isinstance(data, list) else [data]
    return [None if i is None else [next(i) for _ in range(number)] for i in per_chunk]


def tokens_ahead(data: Any, number: int, device: torch.device) -> tuple[torch.Tensor, Any]:
    """Tokens that count in the loss [number] of this rank's target microbatches, and their data
    again, as they were given (collective over a copy of the model, whose first rank reads).

    Raises:
        ValueError: a microbatch without a loss mask.
    """
    chunks = read(data, number)
    counts_n = torch.zeros(number, dtype=torch.float64, device=device)
    batches = next((batches for batches in chunks if batches is not None), [])
    if any("loss_mask" not in batch for batch in batches):
        raise ValueError(
            "several target sets with --calculate-per-token-loss need each target microbatch to be "
            "a dictionary with 'loss_mask'."
        )
    if batches:
        found = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches])
        counts_n.copy_(found, non_blocking=True)
    collectives.from_first(counts_n, compat.model_group())
    again = [None if batches is None else iter(batches) for batches in chunks]
    return counts_n, again if isinstance(data, list) else again[0]


class Weighing:
    """Multiplies the losses of a schedule call's target microbatches, of all that a backward has.

    Args:
        scale_n: of each target microbatch; a general one's is 1.
    """

    def __init__(self, scale_n: torch.Tensor) -> None:
        self._scale_n = scale_n
        self._before: dict[Any, torch.Tensor] | None = None

    def loss(self, loss_func: Callable[..., Any], microbatch: int) -> Callable[..., Any]:
        """The loss function of a target microbatch; its tokens and report are as they were."""

        def weighed(output: Any, *args: Any, **kwargs: Any) -> Any:
            loss, *rest = loss_func(output, *args, **kwargs)
            return loss * self._scale_n[microbatch], *rest

        return weighed

    def backward(self, microbatch: int | None) -> None:
        """The backward of a target microbatch, or a general one (None), begins: what is added
        beside its loss has that loss's scale.

        Megatron sets one scale for all microbatches of a call, after each forward.
        """
        if self._before is None:
            found = {one: getattr(one, _SCALE) for one in _BESIDE}
            self._before = {one: scale.clone() for one, scale in found.items() if scale is not None}
        own = None if microbatch is None else self._scale_n[microbatch]
        for one, scale in self._before.items():
            setattr(one, _SCALE, scale.clone() if own is None else scale * own)


def of_sets(sets: TargetSets | None, count: int) -> Sequence[tuple[str, Sequence[int]]]:
    """How the reports of the first target microbatches, so many, are called: the ending of their
    values' names, and their numbers."""
    if sets is None:
        return [("", range(count))]
    return [
        (f" {name}", [n for n in range(count) if sets.of[n] == k])
        for k, name in enumerate(sets.names)
    ]
