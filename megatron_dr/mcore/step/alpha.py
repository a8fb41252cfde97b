"""The mixing dial over a run: constant, scheduled, or chosen at every step (`projection/alpha`)."""

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.projection import alpha_at, alpha_of, smoothed, statistics


class Alpha:
    """alpha of each step.

    Attributes:
        state: what the rule `auto` has gathered so far; part of a checkpoint.

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
        self.state: torch.Tensor | None = None

    def alpha(self, step: int, samples: int, gram_BRR: torch.Tensor | None) -> torch.Tensor | float:
        """Of a step with a target.

        Args:
            samples: target samples of the step, over all ranks.
            gram_BRR: of the rows, the target and its halves' difference; only `auto` reads it.
        """
        config, fixed = self.config, self.config.feasible_set().alpha
        if fixed is not None:
            return fixed
        if config.alpha_style == "auto":
            assert gram_BRR is not None
            return self._auto(samples, gram_BRR)
        return alpha_at(
            config.alpha_style, config.alpha, config.end_alpha, step, config.alpha_steps or 1
        )

    def _auto(self, samples: int, gram_BRR: torch.Tensor) -> torch.Tensor:
        config = self.config
        assert config.target_size is not None and config.alpha_steps is not None
        new = statistics(config.feasible_set(), config.norm, gram_BRR)
        state = None if self.state is None else self.state.to(new.device)
        self.state = smoothed(state, new)
        passes = config.alpha_steps * min(1.0, samples / config.target_size)
        return alpha_of(self.state, passes)
