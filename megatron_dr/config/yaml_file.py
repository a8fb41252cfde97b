"""A YAML file of plain values, each with its line; nothing in it can make an object."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAG = "tag:yaml.org,2002:"
# PyYAML's own rule, of YAML 1.1, takes 1e-5 for a text
_FLOAT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Entry:
    """A value of a file.

    Attributes:
        value: None, a bool, a number, a text, a list of entries, or a table of them by name.
        text: a single value as it is written.
        line: of the file, from 1.
    """

    value: Any
    text: str
    line: int


Table = dict[str, Entry]


def read(path: Path) -> Table:
    """The entries of a file, by name.

    Raises:
        ValueError: there is none, or it is not YAML, no table of names, or more than plain values.
    """
    try:
        if not path.is_file():  # a pipe would be waited for, by every rank
            raise ValueError(f"{path}: no such file.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read ({error}).") from None
    root = _composed(text, path)
    if root is None:
        return {}
    found = _entry(root, path)
    if not isinstance(found.value, dict):
        raise ValueError(f"{path}:{found.line}: no table of names and values.")
    return found.value


def entry_of(text: str) -> Entry:
    """A value of a command line: as in a file, or the text itself where it is no value there."""
    yaml = _yaml()
    try:
        found = _entry(_composed(text, Path("")), Path(""))
    except (ValueError, AttributeError, yaml.YAMLError):
        return Entry(text, text, 0)
    if isinstance(found.value, str | dict):
        return Entry(text, text, 0)
    return Entry(found.value, text, 0)


def plain(table: Table) -> dict[str, Any]:
    """Names and values without lines."""
    return {name: _plain(entry) for name, entry in table.items()}


def _plain(entry: Entry) -> Any:
    if isinstance(entry.value, dict):
        return plain(entry.value)
    if isinstance(entry.value, list):
        return [_plain(one) for one in entry.value]
    return entry.value


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ValueError("a YAML file needs PyYAML: pip install pyyaml.") from None
    return yaml


def _composed(text: str, path: Path) -> Any:
    yaml = _yaml()

    Loader: Any = type("Loader", (yaml.SafeLoader,), {})
    Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
    try:
        for event in yaml.parse(text, Loader=Loader):
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"{path}:{line}: aliases are not read: write the value again.")
        return yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or type(error).__name__
        raise ValueError(f"{path}{line}: not YAML ({why}).") from None


def _entry(node: Any, path: Path) -> Entry:
    yaml, line = _yaml(), node.start_mark.line + 1
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return Entry(_table(node, path), "", line)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return Entry([_entry(one, path) for one in node.value], "", line)
    if isinstance(node, yaml.ScalarNode) and kind in ("str", "timestamp"):
        return Entry(node.value, node.value, line)
    if isinstance(node, yaml.ScalarNode) and kind in ("null", "bool", "int", "float"):
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, LookupError):  # of a tag that the value does not go with
            raise ValueError(f"{path}:{line}: {node.value!r:.60} is no {kind}.") from None
        return Entry(value, node.value, line)
    raise ValueError(f"{path}:{line}: {node.tag} is no plain value: write a text or a number.")


def _table(node: Any, path: Path) -> Table:
    found: Table = {}
    for name, value in node.value:
        line = name.start_mark.line + 1
        key = getattr(name, "value", None)
        if not isinstance(key, str) or name.tag == _TAG + "merge":
            raise ValueError(f"{path}:{line}: a name must be a text.")
        if key in found:
            raise ValueError(f"{path}:{line}: {key!r} is there twice; first in {found[key].line}.")
        entry = _entry(value, path)
        found[key] = Entry(entry.value, entry.text, line)
    return found
