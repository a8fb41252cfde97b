"""Values of a config.json, each refused by its name where it isn't what it has to be."""

import sys
from collections.abc import Mapping
from typing import Any


def need(config: Mapping[str, Any], name: str) -> Any:
    """A value that can't be left out."""
    if config.get(name) is None:
        raise ValueError(f"config.json: {name!r} is missing.")
    return config[name]


def whole(config: Mapping[str, Any], name: str) -> int:
    """A size: a whole number of 1 or more."""
    found = number(config, name)
    if found < 1 or found != int(found):
        raise _wrong(name, config[name], "a whole number of 1 or more")
    return int(found)


def number(config: Mapping[str, Any], name: str) -> float:
    """A number above 0, which a float holds."""
    found = need(config, name)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise _wrong(name, found, "a number above 0")
    if not 0 < found <= sys.float_info.max:
        raise _wrong(name, found, "a number above 0")
    return found


def switch(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """True or false; the default where it is left out."""
    found = config.get(name)
    if found is None:
        return default
    if not isinstance(found, bool):
        raise _wrong(name, found, "true or false")
    return found


def table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values by name; empty where it is left out."""
    found = config.get(name)
    if found is not None and not isinstance(found, dict):
        raise _wrong(name, found, "a table of names and values")
    return dict(found or {})


def _wrong(name: str, found: Any, kind: str) -> ValueError:
    return ValueError(f"config.json: {name!r} is {str(found)[:50]!r}, but must be {kind}.")
