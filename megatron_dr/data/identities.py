"""Who a sample is: the file and line that it is from, its id, and a hash of its content."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_dr.data.encode import FORMS


class Identity(NamedTuple):
    """As far as it is known; `hash` begins with what was hashed, `text:` or `tokens:`."""

    file: str | None = None
    line: int | None = None
    id: str | None = None
    hash: str | None = None

    @property
    def place(self) -> str:
        """File and line; empty where they are not known."""
        return "" if self.file is None else f"{self.file}:{self.line}"


def content(record: Mapping[str, Any]) -> str:
    """Hash of a record, whatever the order of its fields and the spaces between them."""
    text = json.dumps(record, sort_keys=True, ensure_ascii=False, default=str)
    return f"text:{hashlib.blake2b(text.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"


def of_tokens(ids: Any) -> str:
    """Hash of token ids."""
    ids = np.asarray(ids).astype("<i4")
    return f"tokens:{hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()}"


class Identities:
    """Of the records of a file or folder, in order; 28 bytes each, and its id."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._places: list[tuple[int, int]] = []
        self._hashes: list[bytes] = []
        self._ids: dict[int, str] = {}

    def add(self, where: str, record: Mapping[str, Any]) -> None:
        """The next one.

        Args:
            where: as file:number.
        """
        file, _, number = where.rpartition(":")
        own = record.get("id")
        if isinstance(own, (str, int)):
            self._ids[len(self._places)] = str(own)
        self._places.append((self._files.setdefault(file, len(self._files)), int(number)))
        self._hashes.append(bytes.fromhex(content(record).removeprefix("text:")))

    def __getitem__(self, number: int) -> Identity:
        file, line = self._places[number]
        hashed = f"text:{self._hashes[number].hex()}"
        return Identity([*self._files][file], line, self._ids.get(number), hashed)


class Sources:
    """Which file and line an indexed dataset's samples are from, as `prepare` left it; nothing of
    one that was made otherwise.

    Args:
        prefix: the dataset's path without endings.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = Path(prefix)

    @cached_property
    def _found(self) -> tuple[list[Any], np.ndarray | None]:
        for part in {part for parts in FORMS.values() for part in parts}:
            base = self._prefix.with_name(self._prefix.name.removesuffix(part))
            manifest, places = base.with_name(base.name + ".json"), f"{base.name}_source.npy"
            try:
                listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
                found = np.load(base.with_name(places), mmap_mode="r", allow_pickle=False)
                files = [(str(one["path"]), str(one["sha256"])) for one in listed]
            except (OSError, ValueError, LookupError, TypeError, EOFError, RecursionError):
                continue
            if found.ndim == 2 and found.shape[1] == 2 and found.dtype.kind in "iu":
                return files, found
        return [], None

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each file that it was prepared from."""
        return dict(self._found[0])

    def place(self, number: int) -> tuple[str | None, int | None]:
        """File and line of a sample."""
        files, found = self._found
        if found is None or number >= len(found):
            return None, None
        file, line = found[number].tolist()
        return (files[file][0], line) if 0 <= file < len(files) else (None, None)
