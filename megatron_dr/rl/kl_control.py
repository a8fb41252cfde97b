"""The weight of the KL penalty, steered so that the KL stays near a target."""

from __future__ import annotations

import math

_MAX_ERROR = 0.2


class AdaptiveKL:
    """beta <- beta (1 + clamp(KL/target - 1, -0.2, 0.2) min(samples/horizon, 1)).

    D. M. Ziegler et al., arXiv 1909.08593, 2.2; the minimum is ours: beta stays above 0.

    Args:
        weight: beta at the start, above 0.
        target: KL in nats per completion, or per token: as what `update` is given.
        horizon: samples over which a full error moves beta by about a fifth.

    Raises:
        ValueError: one of them is not above 0.
    """

    def __init__(self, weight: float, target: float, horizon: int) -> None:
        if not (weight > 0 and target > 0 and horizon > 0):
            raise ValueError(
                f"the adaptive KL's weight {weight}, target {target} and horizon {horizon} must "
                "be above 0."
            )
        self.weight, self.target, self.horizon = weight, target, horizon

    def update(self, kl: float, samples: int) -> None:
        """Move the weight after `samples` completions with the mean `kl` over all ranks.

        Raises:
            ValueError: kl is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL to the reference is {kl}; the policy has diverged.")
        error = min(max(kl / self.target - 1, -_MAX_ERROR), _MAX_ERROR)
        self.weight *= 1 + error * min(samples / self.horizon, 1)

    def state_dict(self) -> dict[str, float]:
        return {"weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.weight = float(state["weight"])
