"""The learning rates of a whole run, from Megatron's own scheduler."""

import copy
from typing import Any

from megatron_dr.mcore import compat


def learning_rates(scheduler: Any, steps: int, first: int = 0) -> list[float]:
    """lr_k by the largest of them, of the iterations `first` .. `steps` - 1.

    As the scheduler gives it for weights whose rate has no factor of its own, where no iteration is
    skipped. Nothing of the scheduler is changed.
    """
    at, rates = copy.copy(scheduler), list[float]()
    for samples in compat.samples_before(steps):  # the scheduler's unit of time
        at.num_steps = samples
        rates.append(float(at.get_lr({})))
    rates = rates[first:]
    largest = max(rates, default=0.0)
    return [rate / largest if largest > 0 else 1.0 for rate in rates]
