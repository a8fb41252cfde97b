"""The text of samples that a record of weights names, read from the files that they are from.

A text is shown only where its content is what the run was given.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megatron_dr.data import records
from megatron_dr.data.identities import content

Sample = Mapping[str, Any]  # a row of `weights.samples`
_WHOLE = re.compile(r"(.+):(\d+)")  # who a slot's sample is, where it has no id of its own


class Place(NamedTuple):
    """A line of a file."""

    file: str
    line: int


def place_of(sample: Sample) -> Place | None:
    """Where a sample is; None where the record does not say."""
    if sample["file"] is not None and sample["line"] is not None:
        return Place(sample["file"], sample["line"])
    found = _WHOLE.fullmatch(sample["id"] or "")
    return Place(found[1], int(found[2])) if found else None


def texts(
    samples: Iterable[Sample], sources: Mapping[str, str], base: str = ""
) -> list[tuple[str, bool]]:
    """Of each sample its text and True, or why there is none and False.

    Args:
        sources: sha256 of files that indexed datasets were prepared from (`record.about`).
        base: the folder that the run was started in, for paths from there.
    """
    samples = list(samples)
    wanted: dict[str, set[int]] = {}
    for place in filter(None, map(place_of, samples)):
        wanted.setdefault(place.file, set()).add(place.line)
    found = {file: _lines(os.path.join(base, file), lines) for file, lines in wanted.items()}
    sha256 = functools.cache(lambda file: _sha256(os.path.join(base, file)))
    return [_text(one, found, sources, sha256) for one in samples]


def _text(
    sample: Sample, found: Mapping[str, Any], sources: Mapping[str, str], sha256: Any
) -> tuple[str, bool]:
    place, hashed = place_of(sample), sample["hash"] or ""
    if place is None:
        return "the record does not say where it is from", False
    lines = found[place.file]
    if isinstance(lines, str):
        return lines, False
    if place.line not in lines:
        return f"{place.file} has no such line: it was changed since", False
    record = lines[place.line]
    of_text = hashed.startswith("text:") and content(record) == hashed
    of_file = hashed.startswith("tokens:") and sources.get(place.file) == sha256(place.file)
    if not (of_text or of_file):
        return f"{place.file} has another text there: it was changed since", False
    return shown(record), True


def _lines(file: str, wanted: set[int]) -> dict[int, Any] | str:
    """Those lines, or why they can't be read."""
    if not os.path.isfile(file):
        return f"{file} is not there"
    found, last = {}, max(wanted)
    try:
        for number, raw in records.read_file(file):
            if number in wanted:
                found[number] = records.parse(raw)
            if number >= last:
                break
    except (OSError, ValueError) as error:
        return f"{file} can't be read: {error}"
    return found


def _sha256(file: str) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def shown(record: Mapping[str, Any]) -> str:
    """A record as it is read: its text, what was said by whom, or all of it as JSON."""
    messages = record.get("messages")
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
        return "\n".join(f"{one.get('role')}: {one.get('content')}" for one in messages)
    return json.dumps(record, ensure_ascii=False, indent=1, default=str)
