"""What every fork of the tests' process would do anew, done once before the first."""

import importlib
import sys
from argparse import ArgumentParser
from inspect import unwrap
from typing import Any

from megatron_dr.mcore.loop import writers

_FLAGS = "megatron.training.arguments"
_docstrings: dict[type, dict[str, str]] = {}


def before_forks() -> None:
    writers.before_forks()
    if not _docstrings and _FLAGS in sys.modules:
        _keep_docstrings()


def _keep_docstrings() -> None:
    """Megatron's parser reads its flags' docstrings from the sources, each time it is made."""
    try:
        utils = importlib.import_module("megatron.training.argument_utils")
    except ImportError:  # older versions write the flags out
        return
    read = utils.ArgumentGroupFactory._get_field_docstrings

    def kept(self: Any, kind: type) -> dict[str, str]:
        if kind not in _docstrings:
            _docstrings[kind] = read(self, kind)
        return dict(_docstrings[kind])

    utils.ArgumentGroupFactory._get_field_docstrings = kept
    add = unwrap(sys.modules[_FLAGS].add_megatron_arguments)
    add(ArgumentParser(add_help=False))
