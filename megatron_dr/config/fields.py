"""Fields of a configuration, with what their flags say, and the sentence of a wrong value."""

from dataclasses import field
from typing import Any


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
