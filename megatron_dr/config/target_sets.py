"""Several target sets, or held-out ones, by name: NAME=VALUE, as flags and files have it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# One value, of what has no name; or (name, value) of each.
type Named[T] = T | tuple[tuple[str, T], ...]

_NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class TargetSet:
    """A target set of a run.

    Attributes:
        name: empty where the run has one set without a name.
        path: of its samples; None: they are made as the run goes.
        weight: its share w_k of the target's gradient t = sum_k w_k t_k, t_k its own mean gradient.
        batch: its sequences per step, over all data ranks.
    """

    name: str
    path: str | None
    weight: float
    batch: int


def by_name[T](value: Named[T] | None) -> dict[str, T]:
    """Values by name, in the order given; of one without a name by ''; none of None."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, tuple) else {"": value}


def parsed(flag: str, given: Any, kind: Callable[[str], Any] = str) -> Any:
    """What a flag was given, as a configuration has it.

    Args:
        given: one value, or texts NAME=VALUE.
        kind: of a value: str, int or float.

    Raises:
        ValueError: several values of which one has no name, or a value of another kind.
    """
    texts = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    pairs = [_NAMED.fullmatch(str(text)) for text in texts]
    if len(texts) == 1 and pairs[0] is None:
        return _of(kind, texts[0], flag)
    for text, pair in zip(texts, pairs, strict=True):
        if pair is None:
            raise ValueError(
                f"{flag} {text}: where there are several each has a name, of letters, digits, _ "
                f"and -: give {flag} NAME={text}."
            )
    return tuple((pair[1], _of(kind, pair[2], flag)) for pair in pairs if pair is not None)


def _of(kind: Callable[[str], Any], text: Any, flag: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{flag} {text}: {what} is needed.") from None


def check_names(flag: str, value: Named[Any] | None) -> None:
    """Raise ValueError where two have one name."""
    names = [name for name, _ in value] if isinstance(value, tuple) else []
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{flag} has {twice} twice: give each a name of its own.")


def check_known(flag: str, value: Named[Any] | None, of: str, known: Named[Any] | None) -> None:
    """Raise ValueError where one has a name that another flag, `of`, doesn't have."""
    names = by_name(known)
    for name in by_name(value) if isinstance(value, tuple) else ():
        if name not in names:
            has = ", ".join(names) if isinstance(known, tuple) else "no names"
            raise ValueError(f"{flag} has {name}, but {of} has {has}: give both the same names.")
