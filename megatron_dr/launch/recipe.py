"""A recipe: a model, a method and a size, each a few lines of YAML, laid over one another."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dr.config.yaml_file import Entry, Table, entry_of, read

# What a recipe says. Of a tuple there are no other names; None: any name; "": one value.
_FORM: dict[str, Any] = {
    **dict.fromkeys(
        ("python", "device", "precision", "recompute", "hardware", "gpus", "gpus_per_node",
         "sequences", "hf",
         "data", "target", "valid", "target_valid", "out", "steps", "setup"), "",
    ),
    "layout": ("tp", "pp", "vpp", "cp", "ep", "etp", "sp"),
    "batch": ("micro", "global", "length"),
    "files": ("data", "valid", "target", "target_valid"),
    "slurm": ("time", "signal", "partition", "account", "qos", "job_name", "image", "mounts",
              "more"),
    "config": None, "flags": None, "dr": None, "target_dr": None, "env": None,
}  # fmt: skip
_OF_A_MODEL = ("source", "methods", "sizes")
_KEYS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


@dataclass(frozen=True)
class Recipe:
    """What all of its files and the command line say together.

    Attributes:
        name: model/method/size.
        table: entries by name; those of a table by name again.
    """

    name: str
    table: Table

    def of(self, name: str) -> Table:
        """A table; empty where there is none."""
        found = self.table.get(name)
        return {} if found is None or found.value is None else dict(found.value)

    def value(self, name: str, inner: str = "", default: Any = None) -> Any:
        """One value, of a table where `inner` names it."""
        found = self.of(name).get(inner) if inner else self.table.get(name)
        return default if found is None or found.value is None else found.value

    def text(self, name: str, inner: str = "") -> str:
        """One value as it is written; empty where there is none."""
        found = self.of(name).get(inner) if inner else self.table.get(name)
        return "" if found is None or found.value is None else found.text

    def has(self, name: str) -> bool:
        """Whether something is given, be it an empty list."""
        return self.value(name) not in (None, "")

    def texts(self, name: str, inner: str = "") -> list[str]:
        """The values of a list, or of one value."""
        found = self.value(name, inner, [])
        return [e.text for e in found] if isinstance(found, list) else [self.text(name, inner)]

    def number(self, name: str, inner: str = "", default: int | None = None) -> int:
        """A whole number of 1 or more.

        Raises:
            ValueError: it is none, or there is none.
        """
        found = self.value(name, inner, default)
        if isinstance(found, bool) or not isinstance(found, int) or found < 1:
            key = f"{name}.{inner}" if inner else name
            said = repr(self.text(name, inner) if isinstance(found, list) else found)
            raise ValueError(f"{self.name}: {key} must be a number of 1 or more, not {said}.")
        return found


def read_recipe(folder: Path, name: str, given: Sequence[str]) -> Recipe:
    """The recipe of a name MODEL/METHOD or MODEL/METHOD/SIZE, with key=value over it.

    Raises:
        ValueError: a file, a name or a key that there is not; it says the nearest.
    """
    names = name.split("/")
    if len(names) not in (2, 3) or not all(names):
        raise ValueError(f"{name}: a recipe is MODEL/METHOD or MODEL/METHOD/SIZE.")
    model = _file(folder / "models", names[0])
    method = _file(folder / "methods", names[1])
    sizes = _table(model, "sizes")
    fitting = [size for size, entry in sizes.items() if names[1] in _methods(entry)]
    size = names[2] if len(names) == 3 else next(iter(fitting), "")
    if size not in fitting:
        raise ValueError(f"{name}: of {names[0]}/{names[1]} there are {', '.join(fitting)}.")
    layers = [
        read(folder / "common.yaml"),
        {key: entry for key, entry in model.items() if key not in _OF_A_MODEL},
        method,
        _table(model, "methods", names[1]),
        {key: entry for key, entry in _table_of(sizes[size]).items() if key != "for"},
        *map(_given, given),
    ]
    table: Table = {}
    for layer in layers:
        _check(layer)
        table = _over(table, layer)
    return Recipe(f"{names[0]}/{names[1]}/{size}", table)


def names_of(folder: Path) -> list[str]:
    """All recipes that the folder has."""
    found = []
    for path in sorted((folder / "models").glob("*.yaml")):
        for size, entry in _table(read(path), "sizes").items():
            found += [f"{path.stem}/{method}/{size}" for method in _methods(entry)]
    return found


def _methods(size: Entry) -> list[str]:
    """Those that a model's size is for.

    Raises:
        ValueError: it does not say.
    """
    methods = _table_of(size).get("for")
    if methods is None or not isinstance(methods.value, list):
        raise ValueError(
            f"line {size.line} of a recipe's model: a size needs 'for: [METHOD, ...]'."
        )
    return [method.text for method in methods.value]


def nearest(name: str, known: Iterable[str]) -> str:
    """The name that is most like it."""
    return difflib.get_close_matches(name, list(known), 1, 0.0)[0]


def _file(folder: Path, name: str) -> Table:
    known = [path.stem for path in sorted(folder.glob("*.yaml"))]
    if name not in known:
        if not known:
            raise ValueError(f"{folder}: no recipes are there; name their folder with --recipes.")
        near = nearest(name, known)
        raise ValueError(f"{name}: there is no such file in {folder}; the nearest is {near}.")
    return read(folder / f"{name}.yaml")


def _table(table: Table, *path: str) -> Table:
    for name in path:
        found = table.get(name)
        table = {} if found is None else _table_of(found)
    return table


def _table_of(entry: Entry) -> Table:
    return entry.value if isinstance(entry.value, dict) else {}


def _given(word: str) -> Table:
    """Of a.b=value."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ValueError(f"{word!r} is no key=value.")
    first, dot, rest = key.partition(".")
    entry = entry_of(text)
    return {first: Entry({rest: entry}, "", 0) if dot else entry}


def _check(layer: Table) -> None:
    for name, entry in layer.items():
        form = _FORM.get(name, ())
        if name not in _FORM:
            raise ValueError(f"{name!r} is no key of a recipe; the nearest is "
                             f"{nearest(name, _FORM)!r}.")  # fmt: skip
        is_table = isinstance(entry.value, dict)
        if (form == "") == is_table and entry.value is not None:
            kind = "one value or a list" if form == "" else "a table: NAME.KEY=VALUE"
            raise ValueError(f"{name} of a recipe is {kind}.")
        for inner in entry.value if is_table else ():
            if form and inner not in form:
                raise ValueError(f"{name}.{inner} is no key of a recipe; the nearest is "
                                 f"{name}.{nearest(inner, form)}.")  # fmt: skip
            if name == "env" and any(word in inner.upper() for word in _KEYS):
                raise ValueError(
                    f"env.{inner} would be written into a script: set it in your own environment, "
                    "which the run inherits."
                )


def _over(below: Table, above: Table) -> Table:
    out = dict(below)
    for name, entry in above.items():
        old = out.get(name)
        if old is not None and isinstance(old.value, dict) and isinstance(entry.value, dict):
            entry = Entry(_over(old.value, entry.value), "", entry.line)
        out[name] = entry
    return out
