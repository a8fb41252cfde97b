"""Training, validation and test records of both roles, by content, so that none is in two."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dr.compare.jobs import digest
from megatron_dr.data import split
from megatron_dr.data.encode import COLUMNS
from megatron_dr.data.file_samples import read

PARTS = ("train", "valid", "test")
MOST = 64  # records of a validation or test set
SMALLEST = 4  # as few of them say something
_QUARTER = 4  # held-out sets have at most so much of the records


@dataclass(frozen=True)
class Splits:
    """The files of both roles, and a sentence on each.

    Attributes:
        files: role -> part -> file.
        counts: role -> part -> records.
        said: what was taken.
    """

    files: dict[str, dict[str, Path]]
    counts: dict[str, dict[str, int]]
    said: list[str]


def make(target: str, general: str, out: Path, seed: int) -> Splits:
    """Write `out`/{target,general}.{train,valid,test}.jsonl and splits.json, with their digests.

    Equal records stay together. A general record that the target has too is left out.

    Args:
        target, general: files or folders of samples.

    Raises:
        ValueError: data that can't be read, or too few records.
    """
    out.mkdir(parents=True, exist_ok=True)
    taken = contents(target)
    of_target = parts("--target", target, taken, seed)
    others = contents(general)
    known = set(taken)
    kept = [content not in known for content in others]
    own = [content for content, keep in zip(others, kept, strict=True) if keep]
    of_general = np.full(len(others), -1)
    of_general[np.flatnonzero(kept)] = parts("--general", general, own, seed)
    files, counts, said = {}, {}, []
    for role, path, sides in (("target", target, of_target), ("general", general, of_general)):
        files[role] = {part: out / f"{role}.{part}.jsonl" for part in PARTS}
        _write(path, sides, list(files[role].values()))
        counts[role] = {part: int((sides == n).sum()) for n, part in enumerate(PARTS)}
        held = f"{counts[role]['valid']} for validation, {counts[role]['test']} for the test"
        left = f"; {(sides < 0).sum()} left out, which the target has too" * bool((sides < 0).any())
        said.append(f"{role}: {len(sides)} records, {counts[role]['train']} to train on, {held} "
                    f"(by content and seed {seed}, equal ones together){left}")  # fmt: skip
    found = {path.name: {"sha256": digest(path), "records": counts[role][part]}
             for role in files for part, path in files[role].items()}  # fmt: skip
    record = {"seed": seed, "target": target, "general": general, "files": found}
    (out / "splits.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    return Splits(files, counts, said)


def contents(path: str) -> list[bytes]:
    """A hash of what training reads of each record, 16 bytes.

    Raises:
        ValueError: a record without samples' columns.
    """
    return [_content(where, record) for where, record in read(path)]


def _content(where: str, record: dict[str, Any]) -> bytes:
    known = {name: record[name] for name in COLUMNS if name in record}
    if not known.keys() & {"text", "response", "messages"}:
        raise ValueError(
            f"{where}: a record must have 'text', 'prompt' with 'response', or 'messages'; this "
            f"one has {', '.join(map(repr, record)) or 'no column'}."
        )
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def parts(flag: str, path: str, found: list[bytes], seed: int) -> np.ndarray:
    """Number of the part of each record [n], of PARTS.

    Raises:
        ValueError: too few records.
    """
    distinct = len(set(found))
    size = min(MOST, distinct // _QUARTER)
    if size < SMALLEST:
        raise ValueError(
            f"{flag} {path}: {distinct} different records of its own are too few to hold out "
            f"{SMALLEST} for validation and {SMALLEST} for the test: give at least "
            f"{SMALLEST * _QUARTER}."
        )
    hashes = np.frombuffer(b"".join(found), np.uint8).reshape(-1, 16)
    sides = np.zeros(len(found), int)
    for number in (2, 1):
        left = np.flatnonzero(sides == 0)
        try:
            sides[left[split.validation(hashes[left], size, seed)]] = number
        except ValueError:
            raise ValueError(
                f"{flag} {path}: of {len(found)} records so many are equal that {size} can't be "
                "held out: drop duplicates."
            ) from None
    return sides


def _write(path: str, sides: Iterable[int], files: list[Path]) -> None:
    """Each record into the file of its part; -1: into none."""
    opened = [file.open("w", encoding="utf-8") for file in files]
    for (_, record), side in zip(read(path), sides, strict=True):
        if side >= 0:
            opened[side].write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
    for file in opened:
        file.close()
