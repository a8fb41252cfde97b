"""LoRA's configuration: rank, scale, dropout and which linear layers get adapters."""

import re
from dataclasses import dataclass

from megatron_dr.config.fields import flag, known, must_be


@dataclass(frozen=True)
class LoRAConfig:
    """y = W x + (alpha / rank) B dropout(A x), with W frozen (Hu et al., arXiv 2106.09685).

    Raises:
        ValueError: a dial out of range, in one sentence that says what is allowed.
    """

    rank: int = flag(8, "r: rows of A and columns of B; switches LoRA on", "count")
    alpha: float = flag(16.0, "the adapters' output is scaled by alpha / rank", "factor, > 0")
    dropout: float = flag(0.0, "share of A x that is dropped in training", "share, 0 <= p < 1")
    targets: str | tuple[str, ...] = flag(
        "linear_qkv|linear_proj|linear_fc1|linear_fc2",
        "layers that get adapters: a regular expression for the end of the module's name in the "
        "whole model, from the start of the name or from a dot",
        "pattern",
    )
    seed: int = known(0)  # of A's initial values: the training run's own

    def __post_init__(self) -> None:
        finite = 0.0 < self.alpha < float("inf")
        must_be("at least 1", self.rank >= 1, "LoRA's rank", self.rank)
        must_be("finite and above 0", finite, "LoRA's alpha", self.alpha)
        must_be("in [0, 1)", 0.0 <= self.dropout < 1.0, "LoRA's dropout", self.dropout)
        try:
            self.matches("")
        except re.error as error:
            raise ValueError(
                f"LoRA's targets {self.pattern!r} are no regular expression: {error}."
            ) from None

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    @property
    def pattern(self) -> str:
        """The targets as one regular expression; of a list, any of its patterns."""
        return self.targets if isinstance(self.targets, str) else "|".join(self.targets)

    def matches(self, name: str) -> bool:
        """Whether a module of this name in the whole model is a target."""
        return re.search(rf"(?:^|\.)(?:{self.pattern})$", name) is not None
