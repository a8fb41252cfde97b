"""The general role's blend: paths and weights of Megatron's data flags."""

import argparse
import math
from typing import Any

from megatron.training.utils import get_blend_and_blend_per_split

_FLAGS = ("--train-data-path", "--valid-data-path", "--test-data-path")


def blends(args: argparse.Namespace) -> tuple[Any, Any]:
    """Megatron's blend of all splits, and its blends of each.

    Raises:
        ValueError: weights that Megatron asserts on when its datasets are built, or later.
    """
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except AssertionError:
        raise ValueError(
            "the general data has weights before some paths and not before others, or --data-path "
            "beside --data-args-path: give a weight before each path or before none, by one flag."
        ) from None
    for flag, one in (("--data-path", blend), *zip(_FLAGS, per_split or (), strict=False)):
        paths, weights = one or ((), None)
        for path, weight in zip(paths, weights or (), strict=bool(weights)):
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(
                    f"{flag}: {path} has weight {weight:g}, but weights of a blend are positive "
                    "numbers: leave out the path, or give it another weight."
                )
    return blend, per_split
