"""Fields of a configuration, with what their flags say, and the sentence of a wrong value."""

from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin


def flag(default: Any, help: str, unit: str) -> Any:
    """A field with a flag of its own."""
    return field(default=default, metadata={"help": help, "unit": unit})


def known(default: Any) -> Any:
    """A field without a flag: Megatron's own flags and data tell it to the training loop."""
    return field(default=default, metadata={})


def must_be(says: str, allowed: bool, name: str, value: Any) -> None:
    """Raise ValueError where a dial's value is not `allowed`: what it must be is `says`."""
    if not allowed:
        raise ValueError(f"{name} must be {says}, not {value}.")


def choices(config: Any) -> dict[str, tuple[str, ...]]:
    """Fields of a configuration that take one of a list of names."""
    return {f.name: get_args(f.type) for f in fields(config) if get_origin(f.type) is Literal}
