"""Books: what Megatron's forwards keep beside gradients, of each role by itself.

Routers count tokens by expert, trackers add up losses for the log, attention keeps its largest
logit, and dropout, jitter and forced balancing draw random numbers. Megatron reads all that as the
general microbatches' own. So the target's microbatches have books of their own, in their forward
and, where activations are recomputed, in their backward. With p the target's share of the update
(`FeasibleSet.target_share`; 0: it was only measured) Megatron's finalize, log and optimizer read

| book | as |
|---|---|
| tokens by expert, for the expert bias | (1 - p) C_g + p (N_g / N_t) C_t |
| quantiles, for quantile balancing | (1 - p) q_g + p q_t |
| largest logits, for QK clipping | the general ones; those of both where p > 0 |
| tokens of `global_aux_loss`, losses for the log, random numbers | the general ones |

C the counts of a role, N their sum over experts and ranks, q the mean over its microbatches.

Legend: L layers, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.experimental_attention_variant.dsa import DSAIndexerLossLoggingHelper
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_dr.mcore import collectives, compat, random_state
from megatron_dr.mcore.step.roles import MicrobatchRouter

_COUNTS, _QUANTILES, _QUANTILE_COUNT = "local_tokens_per_expert", "qb_beta_accum", "qb_beta_count"
_BUFFERS = (_COUNTS, _QUANTILES, _QUANTILE_COUNT, "global_tokens_per_expert", "ga_steps")
_LARGEST = "current_max_attn_logits"
_TRACKERS = (
    compat.moe_losses(), (DSAIndexerLossLoggingHelper, "tracker"),
    (MTPLossLoggingHelper, "tracker"),
)  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """Where Megatron looks for one thing: an attribute."""

    owner: Any
    name: str

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    def put(self, value: Any) -> None:
        setattr(self.owner, self.name, value)

    def blank(self) -> Any:
        if self.name in _BUFFERS:
            return torch.zeros_like(self.value)
        return {} if isinstance(self.value, dict) else None  # Megatron makes what is None


def _places(model: list[torch.nn.Module]) -> list[_Place]:
    found = [_Place(*tracker) for tracker in _TRACKERS]
    for module in (m for chunk in model for m in chunk.modules()):
        buffers = module._buffers
        found += [_Place(module, name) for name in _BUFFERS if buffers.get(name) is not None]
        if _LARGEST in module.__dict__:
            found.append(_Place(module, _LARGEST))
    return found


@contextmanager
def opened(
    model: list[torch.nn.Module], router: MicrobatchRouter, kept: bool = True
) -> Iterator["Books"]:
    """Books for one schedule call; the general role's are Megatron's own again at the end.

    Args:
        kept: whether what the general microbatches leave there is the step's; else all is as
            before at the end.
    """
    router.books = books = Books(model, router, kept)
    try:
        yield books
    finally:
        books.close()


class Books:
    """The books of both roles in one schedule call. See the module."""

    def __init__(self, model: list[torch.nn.Module], router: MicrobatchRouter, kept: bool) -> None:
        self._runs = router.num_general > 0, router.num_target > 0
        self._places = _places(model)
        self._before = None if kept else [place.value for place in self._places]
        self._closed = [place.blank() for place in self._places]  # of the role that is not open
        self._of_target = self._draws_target = False
        self._random = random_state.forked() if all(self._runs) else None
        if not kept:
            for place in self._places:
                place.put(place.blank())

    def open(self, target: bool, forward: bool) -> None:
        """A microbatch begins, its forward or its backward."""
        if target != self._of_target:
            self._of_target = target
            closing = [place.value for place in self._places]
            for place, value in zip(self._places, self._closed, strict=True):
                place.put(value)
            self._closed = closing
        # in a backward nothing is drawn: recomputation puts its forward's random state back
        if forward and self._random is not None and target != self._draws_target:
            self._draws_target = target
            closing_state = random_state.save()
            random_state.restore(self._random)
            self._random = closing_state

    def close(self) -> None:
        self.open(False, forward=True)
        if self._before is not None:
            for place, value in zip(self._places, self._before, strict=True):
                place.put(value)

    @torch.no_grad()
    def settle(self, share: torch.Tensor | float, ranks: float) -> None:
        """Leave what Megatron reads: before its finalize (collective).

        Args:
            share: of the target in the update.
            ranks: data ranks over those that run this rank's role, where it runs one alone; else 1.
        """
        self.open(False, forward=False)
        trained = not (isinstance(share, float) and share == 0.0)
        if isinstance(share, torch.Tensor):  # Megatron leaves out a step that is not finite
            share = share.nan_to_num(0.0)
        if trained:
            self._mix_counts(share)
        if trained or ranks != 1.0:
            self._mix_quantiles(share, ranks)
        for place, target in zip(self._places, self._closed, strict=True):
            if place.name == _LARGEST:
                place.put(_largest(place.value, target, trained))
        if ranks != 1.0:
            self._log_over_ranks(ranks)

    def _pairs(self, name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """General and target, of each router."""
        both = zip(self._places, self._closed, strict=True)
        return [(place.value, target) for place, target in both if place.name == name]

    def _mix_counts(self, share: torch.Tensor | float) -> None:
        pairs = self._pairs(_COUNTS)
        if not pairs:
            return
        counts_L2E = torch.stack([torch.stack(pair) for pair in pairs]).double()
        total_L2 = counts_L2E.sum(-1)
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        collectives.all_reduce(total_L2, group)
        ratio_L1 = (total_L2[:, 0] / total_L2[:, 1].clamp(min=1.0))[:, None]
        mixed_LE = (1.0 - share) * counts_L2E[:, 0] + share * ratio_L1 * counts_L2E[:, 1]
        for (general, _), mixed_E in zip(pairs, mixed_LE, strict=True):
            general.copy_(mixed_E)

    def _mix_quantiles(self, share: torch.Tensor | float, ranks: float) -> None:
        sums, numbers = self._pairs(_QUANTILES), self._pairs(_QUANTILE_COUNT)
        for (general, target), (number, target_number) in zip(sums, numbers, strict=True):
            mean_g = general / number.clamp(min=1)
            mean_t = target / target_number.clamp(min=1)
            general.copy_(ranks * ((1.0 - share) * mean_g + share * mean_t))
            number.fill_(1)

    def _log_over_ranks(self, ranks: float) -> None:
        """Megatron's mean over all data ranks becomes one over those of the general role. A rank of
        the target adds zeros; its own entries tell it in which collectives it takes part."""
        general = self._runs[0]
        for place, target in zip(self._places[: len(_TRACKERS)], self._closed, strict=False):
            if not general:
                place.put(target)
            entries = getattr(place.value, "metrics", place.value) or {}
            for entry in entries.values():
                value = _values(entry)
                if isinstance(value, torch.Tensor):
                    value.copy_(value * ranks if general else torch.zeros_like(value))


def _values(entry: Any) -> Any:
    """The tensor of an entry of a tracker: it is one, has one, or says how one is reduced."""
    if isinstance(entry, torch.Tensor):
        return entry
    return entry.get("values") if isinstance(entry, dict) else getattr(entry, "values", None)


def _largest(general: Any, target: Any, trained: bool) -> Any:
    """Of both where the target is trained on. All ranks have one: Megatron reduces them."""
    if general is None or target is None:
        here = target if general is None else general
        unused = general is None and target is not None and not trained
        return torch.full_like(here, float("-inf")) if unused else here
    return torch.maximum(general, target) if trained else general
