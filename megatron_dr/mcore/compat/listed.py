"""Which of Megatron's options somebody has looked at: options.txt and flags.txt.

An option of a new version does what it does whether or not the plugin knows of it. So what is in no
section is named when the plugin is attached, or a run begins; the tests fail on it.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from megatron.core import __version__

from megatron_dr.mcore.compat.versions import INSTALLED, Minor

OPTIONS, FLAGS = "options.txt", "flags.txt"
_KINDS = re.compile(r"^\[(\w+(?: \d+\.\d+)?)\]$", re.M)


@cache
def sections(file: str) -> dict[str, tuple[str, ...]]:
    """Names by section. Those of [since 0.20] and [until 0.18] are in another section too: other
    versions don't have them."""
    text = (Path(__file__).parent / file).read_text(encoding="utf-8")
    found = _KINDS.split(re.sub(r"#.*$", "", text, flags=re.M))[1:]
    return {kind: tuple(names.split()) for kind, names in zip(found[::2], found[1::2], strict=True)}


def kinds(file: str) -> dict[str, tuple[str, ...]]:
    """The sections that say what an option is."""
    return {kind: names for kind, names in sections(file).items() if " " not in kind}


def absent(file: str, installed: Minor = INSTALLED) -> set[str]:
    """Names that the installed version doesn't have."""
    gone: set[str] = set()
    for kind, names in sections(file).items():
        word, _, version = kind.partition(" ")
        if version:
            major, minor = map(int, version.split("."))
            later, earlier = (major, minor) > installed, (major, minor) < installed
            gone |= set(names) if (later if word == "since" else earlier) else set()
    return gone


def known(file: str) -> frozenset[str]:
    return frozenset(name for names in kinds(file).values() for name in names)


def fields(configuration: Any) -> dict[str, Any]:
    """Megatron-Core's own fields of a configuration, or of its class: a host's class has more."""
    kind = configuration if isinstance(configuration, type) else type(configuration)
    ours = [c for c in kind.__mro__ if c.__module__.startswith("megatron.core.")]
    names = {f.name for c in ours if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}
    return {f.name: f for f in dataclasses.fields(kind) if f.name in names}


def _warning(of: str, file: str, found: Iterable[str]) -> str:
    new = sorted(set(found) - known(file))
    return "" if not new else (
        f"warning: nobody has looked at what these {of} of megatron-core {__version__} do to "
        f"gradients, schedules or checkpoints: {', '.join(new)}; leave them as they are by default."
    )  # fmt: skip


def unknown_flags() -> str:
    """As `unknown_fields`, of the flags of Megatron's training loop."""
    from megatron.training import arguments

    add = inspect.unwrap(arguments.add_megatron_arguments)
    actions = add(argparse.ArgumentParser(add_help=False))._actions
    return _warning("flags", FLAGS, (action.dest for action in actions))


def unknown_fields(*configurations: Any) -> str:
    """The sentence that names fields that nobody has looked at; empty where there are none."""
    return _warning("fields", OPTIONS, (name for c in configurations for name in fields(c)))
