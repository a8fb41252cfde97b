"""Fields of a configuration, with what their flags say."""

from dataclasses import field
from typing import Any


def flag(default: Any, help: str, unit: str) -> Any:
    """A field with a flag of its own."""
    return field(default=default, metadata={"help": help, "unit": unit})


def known(default: Any) -> Any:
    """A field without a flag: Megatron's own flags and data tell it to the training loop."""
    return field(default=default, metadata={})
