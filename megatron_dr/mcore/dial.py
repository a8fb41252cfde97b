"""The mixing dial over a run: constant, scheduled, or chosen at every step (`projection/dial`)."""

from collections.abc import Callable

import torch

from megatron_dr.config import DRConfig
from megatron_dr.projection import alpha_at, alpha_of, smoothed, statistics


class AlphaDial:
    """alpha of each step.

    Attributes:
        state: what the rule `auto` has gathered so far; part of a checkpoint.
    """

    def __init__(self, config: DRConfig) -> None:
        self.config = config
        self.state: torch.Tensor | None = None

    def of_step(
        self, step: int, samples: int, with_target: bool
    ) -> Callable[[torch.Tensor], torch.Tensor | float]:
        """alpha as a function of the step's gram.

        Args:
            samples: target samples of the step, over all ranks.
        """
        config = self.config
        if not with_target:
            return lambda gram: 0.0
        if config.set == "target":  # the target alone
            return lambda gram: 1.0
        if config.alpha_style == "auto":
            return lambda gram: self._auto(gram, samples)
        alpha = alpha_at(
            config.alpha_style, config.alpha, config.end_alpha, step, config.alpha_steps or 1
        )
        return lambda gram: alpha

    def _auto(self, gram_BRR: torch.Tensor, samples: int) -> torch.Tensor:
        config = self.config
        assert config.target_size is not None and config.alpha_steps is not None
        new = statistics(config.feasible_set(), config.norm, gram_BRR)
        state = None if self.state is None else self.state.to(new.device)
        self.state = smoothed(state, new)
        passes = config.alpha_steps * min(1.0, samples / config.target_size)
        return alpha_of(self.state, passes)
