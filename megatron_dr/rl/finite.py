"""Numbers that others give, such as rewards and log-probabilities."""

import numbers
from typing import Any

_LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which training keeps them


def finite(value: Any) -> float | None:
    """A real number as a float; None where it is none, or is NaN, infinite or beyond float32."""
    if not isinstance(value, numbers.Real):
        return None
    try:
        found = float(value)
    except OverflowError:  # of an int or a fraction, such as 10**400
        return None
    return found if abs(found) <= _LARGEST else None
