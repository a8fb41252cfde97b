"""The mixing dial over a run: constant, scheduled, or chosen at every step (`projection/alpha`)."""

from typing import Any

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.projection import alpha_at, alpha_of, in_unit_of, smoothed, statistics


class Alpha:
    """alpha of each step.

    Attributes:
        statistics: what the rule `auto` has gathered so far, of mean gradients: the same whatever
            the layout, the number of tokens and the loss's normalisation and scale.

    Raises:
        ValueError: its rule lacks what only the run can say.
    """

    def __init__(self, config: DRConfig) -> None:
        style = config.alpha_style
        if style != "constant" and config.alpha_steps is None:
            raise ValueError(f"alpha_style {style!r} needs alpha_steps, the run's length.")
        if style == "auto" and config.target_size is None:
            raise ValueError("alpha_style 'auto' needs target_size, the samples of the target set.")
        self.config = config
        self.statistics: torch.Tensor | None = None
        self._of_other_unit: torch.Tensor | None = None

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """For a checkpoint; it can be loaded in another layout."""
        return None if self.statistics is None else {"statistics": self.statistics}

    def load(self, state: Any) -> None:
        """Earlier versions kept a bare tensor, times a factor that went with layout and tokens.
        What is no state of the rule (the run before had another) counts as none."""
        is_own = isinstance(state, dict) and "statistics" in state
        self.statistics = state["statistics"] if is_own else None
        self._of_other_unit = state if isinstance(state, torch.Tensor) else None

    def alpha(self, step: int, samples: int, gram_BRR: torch.Tensor | None) -> torch.Tensor | float:
        """Of a step with a target.

        Args:
            samples: target samples of the step, over all ranks.
            gram_BRR: of the rows, the target and its halves' difference, as mean gradients; only
                `auto` reads it.
        """
        config, fixed = self.config, self.config.feasible_set().alpha
        if fixed is not None:
            return fixed
        if config.alpha_style == "auto":
            assert gram_BRR is not None
            return self._auto(step, samples, gram_BRR)
        return alpha_at(
            config.alpha_style, config.alpha, config.end_alpha, step, config.alpha_steps or 1
        )

    def _auto(self, step: int, samples: int, gram_BRR: torch.Tensor) -> torch.Tensor:
        config = self.config
        assert config.target_size is not None and config.alpha_steps is not None
        new = statistics(config.feasible_set(), config.norm, gram_BRR)
        before = None if self.statistics is None else self.statistics.to(new.device)
        if self._of_other_unit is not None:
            before = in_unit_of(self._of_other_unit.to(new.device), new, step)
            self._of_other_unit = None
        self.statistics = smoothed(before, new)
        passes = config.alpha_steps * min(1.0, samples / config.target_size)
        return alpha_of(self.statistics, passes)
