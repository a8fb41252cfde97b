"""--dr-config: the plugin's flags from a YAML file, as defaults that the command line overrides."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_dr.config.target import NAMED
from megatron_dr.config.yaml_file import Entry, read
from megatron_dr.mcore import cpu
from megatron_dr.mcore.loop import validation
from megatron_dr.mcore.loop.arguments import add_arguments

_PREFIX = "--dr-"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def add_flags(stock: Callable[..., Any], parser: argparse.ArgumentParser) -> Any:
    """Megatron's `add_megatron_arguments`, with our flags and the values of the file."""
    found = add_arguments(stock(parser))
    validation.early(apply, found, sys.argv[1:])
    return found


def apply(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Make the values of the file that a command line names the parser's defaults.

    They are then given as those of the command line are: nothing after the parser knows which is
    which.

    Raises:
        ValueError: a file that can't be read, a name that is no flag of ours, or a wrong value,
            with its file and line.
    """
    path = cpu.config_file(argv)
    if path is not None:
        parser.set_defaults(**_values(Path(path)))


def _values(path: Path) -> dict[str, Any]:
    ours = _Parser(add_help=False, allow_abbrev=False)
    add_arguments(ours)
    known = {
        option.removeprefix(_PREFIX): action
        for action in ours._actions
        for option in action.option_strings
        if option.startswith(_PREFIX) and option != _PREFIX + "config"
    }
    found: dict[str, Any] = {}
    for name, entry in read(path).items():
        where = f"{path}:{entry.line}"
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            raise ValueError(
                f"{where}: {name!r} is none of the plugin's flags without {_PREFIX}; the nearest "
                f"is {near!r}."
            )
        action = known[name]
        words = _words(name, entry, action, where)
        try:
            parsed = ours.parse_args(words)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
        if words:
            found[action.dest] = getattr(parsed, action.dest)
    return found


def _words(name: str, entry: Entry, action: argparse.Action, where: str) -> list[str]:
    """The entry as on a command line; of a switch that is off, nothing."""
    flag, value = _PREFIX + name, entry.value
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: {name} must be true or false, not {entry.text!r}.")
        return [flag] if value else []
    by_name = action.dest.removeprefix("dr_") in NAMED
    if isinstance(value, dict) and by_name:
        if value and all(one.text for one in value.values()):
            return [flag, *(f"{key}={one.text}" for key, one in value.items())]
    elif isinstance(value, list) and action.nargs == "+":
        texts = [one.text for one in value]
        if texts and all(texts) and not any(text.startswith("-") for text in texts):
            return [flag, *texts]
    elif value is not None and not isinstance(value, list | dict):
        return [f"{flag}={entry.text}"]
    kind = "one value or a list of them" if action.nargs == "+" else "one value"
    kind = "one value, or a table of them by name" if by_name else kind
    raise ValueError(f"{where}: {name} must have {kind}.")
