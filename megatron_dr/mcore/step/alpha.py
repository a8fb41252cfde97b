"""alpha and beta over a run: constant, scheduled, or chosen at every step (`projection/rule`)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.say import say
from megatron_dr.projection import alpha_at, rule, safest_alpha


class Shares(NamedTuple):
    """Of a step.

    Attributes:
        alpha, beta: as in `projection.project`.
        log: values for the log, by their names there.
        weights_BM: of the projection, where choosing them has solved for it.
    """

    alpha: torch.Tensor | float
    beta: torch.Tensor | float
    log: Mapping[str, torch.Tensor | float] = {}
    weights_BM: torch.Tensor | None = None


class Alpha:
    """alpha and beta of each step.

    Attributes:
        rates: of the run's steps, the learning rate by its largest; None: all are alike. What a
            host's loop knows of its schedule; only `auto` reads it.
        averages: what the rule has gathered so far, in pure numbers (`rule.gathered`): the same
            whatever the layout, the number of tokens and the loss's normalisation and scale.

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
        self.rates: Sequence[float] | None = None
        self.averages: torch.Tensor | None = None
        self._older, self._said = False, False
        self._passes: tuple[float, float] | None = None

    @property
    def state(self) -> dict[str, torch.Tensor] | None:
        """For a checkpoint; it can be loaded in another layout."""
        return None if self.averages is None else {"averages": self.averages}

    def load(self, state: Any) -> None:
        """What an older rule gathered says nothing of what this one needs: it gathers anew. What is
        no state of a rule (the run before had another style) counts as none."""
        known = state if isinstance(state, dict) else {}
        averages = known.get("averages")
        fits = averages is not None and averages.shape == (rule.STATE,)
        self.averages = averages if fits else None
        self._older = bool(known and not fits) or isinstance(state, torch.Tensor)

    def shares(
        self, step: int, samples: int, gram_BRR: torch.Tensor | None, lacks: str = "",
        share_M: torch.Tensor | None = None,
    ) -> Shares:  # fmt: skip
        """Of a step with a target.

        Args:
            samples: target samples of the step, over all ranks.
            gram_BRR: of the rows, the target and its halves' difference, times any factor; only
                `auto` reads it.
            lacks: why there is no such gram, where `auto` would need it.
            share_M: of the rows' tokens, for the norm `tokens`.
        """
        config, fixed = self.config, self.config.feasible_set().alpha
        if fixed is not None:
            return Shares(fixed, 0.0)
        if config.alpha_style != "auto":
            steps = config.alpha_steps or 1
            alpha = alpha_at(config.alpha_style, config.alpha, config.end_alpha, step, steps)
            log = {} if config.alpha_style == "constant" else {"dr alpha": alpha}
            return Shares(alpha, config.beta, log)
        if gram_BRR is None:
            return self._constant(samples, lacks)
        return self._auto(step, samples, gram_BRR, share_M)

    def _auto(
        self, step: int, samples: int, gram_BRR: torch.Tensor, share_M: torch.Tensor | None
    ) -> Shares:
        config, (of_step, passes) = self.config, self._passes_of(samples)
        if not self._said:
            self._said = True
            say(_start(config, samples, passes, self.rates is not None))
            if self._older:
                say(
                    "note: what --dr-alpha-style auto gathered in the checkpoint's run is of an "
                    "older rule, so it gathers anew"
                )
        seen = rule.seen(config.feasible_set(), config.norm, gram_BRR, share_M)
        before = None if self.averages is None else self.averages.to(gram_BRR.device)
        if before is None and step > 0:  # the target is no longer new
            before = rule.blank(gram_BRR, passes=1.0)
        state = rule.gathered(before, seen)
        choice = rule.chosen(state, seen, passes, config.keep_general)
        self.averages = rule.worn(state, choice, seen, of_step * self._rate(step))
        alpha, beta = rule.shares(choice, seen)
        log: dict[str, torch.Tensor | float] = {
            "dr alpha": alpha, "dr beta": beta, "dr r": choice.r, "dr D": choice.D,
            "dr G": choice.G, "dr m": choice.m, "dr E": passes,
            "dr wear": self.averages[-1] / rule.PASSES,
        }  # fmt: skip
        return Shares(alpha, beta, log, seen.weights_BM)

    def _constant(self, samples: int, lacks: str) -> Shares:
        _, passes = self._passes_of(samples)
        alpha = safest_alpha(passes)
        if not self._said:
            self._said = True
            say(
                f"note: --dr-alpha-style auto can't choose, as {lacks}: alpha is {alpha:.3g} at "
                f"every step, so that of E = {passes:.3g} passes over the target set its gradient "
                "takes part in no more than 1.5"
            )
        return Shares(alpha, 0.0, {"dr alpha": alpha, "dr E": passes})

    def _rate(self, step: int) -> float:
        return 1.0 if not self.rates else self.rates[min(step, len(self.rates) - 1)]

    def _passes_of(self, samples: int) -> tuple[float, float]:
        """Passes over the target set of a step at the largest learning rate, and of the run, E."""
        size, steps = self.config.target_size, self.config.alpha_steps
        assert size is not None and steps is not None
        of_step = min(1.0, samples / size)
        if self._passes is None or self._passes[0] != of_step:
            total = float(steps) if self.rates is None else float(sum(self.rates))
            self._passes = of_step, of_step * total
        return self._passes


def _start(config: DRConfig, samples: int, passes: float, has_rates: bool) -> str:
    """What the rule begins with, and what follows from it."""
    counted = (
        "each step counted by its learning rate" if has_rates else
        "all steps counted alike, as no learning rates were given"
    )  # fmt: skip
    part = rule.PASSES / passes if passes > 0 else 1.0
    follows = (
        "so it lasts the run" if part >= 1.0 else
        f"so it can make up no more than {part:.0%} of the steps' length without being worn out"
    )  # fmt: skip
    floor = f"; the update's cosine with the general mean is at least {config.keep_general:g}"
    floor = floor if config.keep_general else ""
    return (
        f"alpha auto: the run has {config.target_size} different target samples (n), a step "
        f"{samples} (b): E = {passes:.3g} passes over them in the run, {counted}; the target's own "
        f"gradient is of use for about {rule.PASSES:g}, {follows}{floor}"
    )
