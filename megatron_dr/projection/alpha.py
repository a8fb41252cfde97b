"""alpha where it looks at no gradient: the schedules, and the constant that is safest."""

import math

_SAFE_PASSES = 1.5  # of t over the target set, counted by learning rate


def alpha_at(style: str, start: float, end: float, step: int, steps: int) -> float:
    """alpha at a step of a run: `start` at step 0, `end` from step `steps` on.

    :param style: `constant` (start always), `linear`, or `cosine` (half a cosine, flat at both
        ends).
    """
    if style not in ("constant", "linear", "cosine"):
        raise ValueError(f"alpha style is {style!r}; it must be 'constant', 'linear' or 'cosine'.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; an alpha schedule needs at least 1.")
    share = min(max(step / steps, 0.0), 1.0)
    if style == "cosine":
        share = (1.0 - math.cos(math.pi * share)) / 2.0
    return start if style == "constant" else (1.0 - share) * start + share * end


def safest_alpha(passes: float) -> float:
    """min(1/2, 1.5/E): the constant for a run of which nothing but E is known.

    What loses a run is t learnt by heart, and that takes passes, whatever the data are: so the
    passes of t are bounded, a E <= 1.5, and a <= 1/2. In the regimes of docs/alpha.md where
    constants were measured it is within 6% of the best one, where any number for all regimes is up
    to 6 to 20% away, and without a bound where the passes are many.

    :param passes: E of the whole run (`rule`).
    """
    return min(0.5, _SAFE_PASSES / passes) if passes > 0.0 else 0.5
