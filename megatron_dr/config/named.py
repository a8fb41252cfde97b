"""Functions that a flag names, as module:function."""

import pkgutil
from collections.abc import Callable
from typing import Any

from megatron_dr.report import hidden


def resolved(what: str, name: str, kind: str) -> Any:
    """What `module:name` names, or one ValueError."""
    try:
        return pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # the module's own code may raise any
        why = hidden.error(error, bare=hidden.SENTENCES)
        raise ValueError(
            f"{what} {name!r} can't be loaded: {why}. The module must be importable (see "
            f"PYTHONPATH) and define the {kind}."
        ) from error


def load_function(what: str, name: str) -> Callable[..., Any]:
    """The function named `module:function`.

    Args:
        what: what it is, for error messages.

    Raises:
        ValueError: the name has another form, or names nothing that can be called.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"{what} must be named module:function, not {name!r}.")
    found = resolved(what, name, "function")
    if not callable(found):
        raise ValueError(f"{what} {name!r} is a {type(found).__name__}, not a function.")
    return found  # type: ignore[no-any-return]
