"""Tests of tables and of pairs of them: some at each commit, all of them in `make soak`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def some(table: Mapping[str, Any], *kept: str) -> list[Any]:
    """A table's rows as parameters by name; `make test` has those that are named alone."""
    unknown = set(kept) - set(table)
    assert not unknown, unknown
    return [
        pytest.param(*row, id=name, marks=() if name in kept else pytest.mark.soak)
        for name, row in ((name, x if isinstance(x, tuple) else (x,)) for name, x in table.items())
    ]


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
