"""Data files: which endings are data, and what a folder holds."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_KINDS = {
    ".jsonl": "json", ".json": "json", ".jsonl.gz": "json", ".json.gz": "json",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
SUFFIXES = tuple(_KINDS)  # in capitals too
_ABOUT = ("dataset_info.json", "dataset_infos.json")  # what Hugging Face writes beside data
_NAMED = 5  # files that a sentence names


def kind(path: str | Path) -> str | None:
    """`json`, `parquet` or `arrow`; None for a path that does not end as data."""
    return _KINDS.get(ending(path))


def ending(path: str | Path) -> str:
    """The ending of a data file in small letters; empty where it is none."""
    name = Path(path).name.lower()
    return max((end for end in SUFFIXES if name.endswith(end)), key=len, default="")


def is_gzip(path: str) -> bool:
    return ending(path).endswith(".gz")


def list_files(paths: list[str]) -> list[str]:
    """The data files of files, folders and datasets on disk.

    Folders with all that is in them, in the order of names.

    Raises:
        ValueError: a path that is not there, of an unknown kind, or a folder without data.
    """
    files: list[str] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += _found(path)
        elif not path.is_file():
            raise ValueError(f"{path}: no such file or folder.")
        elif kind(path) is None:
            raise ValueError(f"{path}: not data: name a file that ends in {', '.join(SUFFIXES)}.")
        else:
            files.append(str(path))
    twice = {file for file in files if files.count(file) > 1}
    if twice:
        raise ValueError(f"{min(twice)}: given twice: name it once.")
    return files


def passed_over(paths: Iterable[str]) -> str | None:
    """A sentence on what folders hold that is not read; None if there is nothing."""
    sentences = []
    for path in map(Path, paths):
        names = _walk(path)[1] if path.is_dir() else []
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            sentences.append(f"{path}: passed over {', '.join(names[:_NAMED])}{more}")
    return "; ".join(sentences) or None


def _found(folder: Path) -> list[str]:
    files, others = _walk(folder)
    if not files:
        hint = f" (it has {', '.join(others[:_NAMED])})" if others else ""
        raise ValueError(
            f"{folder}: no .jsonl or .parquet file in it, or another that ends in "
            f"{', '.join(SUFFIXES)}, and no dataset on disk{hint}."
        )
    return files


def _walk(folder: Path, top: Path | None = None) -> tuple[list[str], list[str]]:
    """(data files, what else there is: its paths from the top folder) of a folder."""
    top = top or folder
    saved = _dataset_files(folder)
    if saved is not None:
        return saved, []
    files, others = list[str](), list[str]()
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(top))
        if path.is_dir():
            circle = path.is_symlink() and folder.resolve().is_relative_to(path.resolve())
            if circle or path.name.startswith("."):
                others.append(name + "/")
                continue
            inner = _walk(path, top)
            files += inner[0]
            others += inner[1]
        elif kind(path) and path.is_file() and not path.name.startswith((".", *_ABOUT)):
            files.append(str(path))
        else:
            others.append(name)
    return files, others


def _dataset_files(folder: Path) -> list[str] | None:
    """The files of a dataset as `save_to_disk` writes it; None: the folder is none."""
    names = _json(folder / "dataset_dict.json").get("splits")
    if isinstance(names, list):
        raise ValueError(
            f"{folder}: a dataset of several splits: name one of "
            f"{', '.join(str(folder / f'{name}') for name in names)}."
        )
    saved = _json(folder / "state.json")
    if "_data_files" not in saved:
        return None
    if saved.get("_indices_data_files") or saved.get("_indices_files"):
        raise ValueError(
            f"{folder}: a dataset that selects rows of its files: save it again with "
            "flatten_indices()."
        )
    return [str(folder / _part(folder, part)) for part in _list(saved["_data_files"])]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _part(folder: Path, part: Any) -> str:
    """The name of a file of a dataset on disk.

    Raises:
        ValueError: it is none of the folder, or no data.
    """
    name = part.get("filename") if isinstance(part, dict) else part
    inside = isinstance(name, str) and Path(name).name == name
    if not (inside and kind(f"{name}") and (folder / f"{name}").is_file()):
        raise ValueError(
            f"{folder / 'state.json'}: damaged: {name!r:.100} is no file of data in the folder."
        )
    return str(name)


def _json(path: Path) -> dict[str, Any]:
    """The object in a small file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
