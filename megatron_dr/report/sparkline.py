"""A curve in a line of text."""

import math

from megatron_dr.report.run_log import Curve

_LEVELS = "▁▂▃▄▅▆▇█"
BAD = "×"  # a value that is no finite number


def drawn(curve: Curve, width: int) -> str:
    """From its least to its most, in at most so many letters, each a mean; NaN and infinity are
    crosses."""
    least, most = curve.extreme(min), curve.extreme(max)
    values = curve.thinned(width)[0].values
    span = most - least
    if not span > 0:
        return "".join(_LEVELS[0] if math.isfinite(value) else BAD for value in values)
    return "".join(
        _LEVELS[round((value - least) / span * (len(_LEVELS) - 1))] if math.isfinite(value) else BAD
        for value in values
    )
