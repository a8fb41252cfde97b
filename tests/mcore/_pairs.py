"""Tests of every pair of two tables: some at each commit, all of them in `make soak`."""

from collections.abc import Iterable

import pytest


def pairs(first: Iterable[str], second: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises (first, second) by all pairs of names. In `make test` each of the first has one
    of the second, by turns, so that each name of both has a test there."""
    turns = tuple(second)
    return pytest.mark.parametrize(
        ("first", "second"),
        [
            pytest.param(
                name, other, id=f"{name}-{other}",
                marks=() if place == number % len(turns) else pytest.mark.soak,
            )
            for number, name in enumerate(first)
            for place, other in enumerate(turns)
        ],
    )  # fmt: skip
