"""The second line of a run's log.

Megatron 0.19 logs a process's first iteration whatever --log-interval says, and keeps its sums for
the interval that it lies in. Where the interval ends with it, as each does with --log-interval 1,
they stay all the same, and the next line is a mean with that iteration in it.
"""

from typing import Any


def log(
    stock: Any, losses: Any, sums: Any, rate: Any, iteration: int, *rest: Any,
    is_first_iteration: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """Megatron's `training_log`, which forgets an interval's sums at its end."""
    from megatron.training import get_args

    first = is_first_iteration and iteration % get_args().log_interval != 0
    return stock(losses, sums, rate, iteration, *rest, is_first_iteration=first, **kwargs)
