"""A piece of the input worked through: its samples in one file, which a later run finds again."""

import io
import json
import os
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dr.data import records
from megatron_dr.data.encode import FORMS, Encoder
from megatron_dr.data.sample import Sample

SHOWN = 3  # bad lines that a report quotes, per shard


@dataclass(frozen=True)
class Rules:
    """What happens to samples that are too long and lines that are wrong.

    Attributes:
        max_length: most tokens of a sequence; None for any.
        too_long: `cut` on the right, `drop` the sample, or `refuse` the line.
        skip_bad: count wrong lines and go on.
    """

    max_length: int | None
    too_long: str
    skip_bad: bool

    def apply(self, sample: Sample) -> tuple[Sample | None, str]:
        """The sample that is kept, or None; and 'cut', why it is dropped, or ''.

        Raises:
            ValueError: too long, where that is refused.
        """
        limit = self.max_length
        longest = max(len(part.ids) for part in sample.parts)
        if limit is None or longest <= limit:
            return sample, ""
        if self.too_long == "refuse":
            raise ValueError(
                f"{longest} tokens, more than --max-length {limit}: shorten it, raise the limit, "
                "or give --too-long cut or drop."
            )
        if self.too_long == "drop":
            return None, "too long"
        shorter = Sample(tuple(part.cut(limit) for part in sample.parts), sample.fields)
        if not all(part.mask.any() for part in shorter.parts):
            return None, "the prompt alone is too long"
        return shorter, "cut"


@dataclass
class Shard:
    """The samples of a piece.

    Attributes:
        ids, mask: per sequence of the form, the tokens of all samples one after the other.
        lengths: per sequence of the form, int64 [n].
        lines: int64 [n], the line or row of each sample.
        contents: uint8 [n, 16], each sample's content hash.
        fields: one JSON line per RL prompt, else empty.
        counts: records, cut, bad, and dropped samples by reason.
        bad_lines: the first of the wrong lines.
    """

    ids: list[np.ndarray]
    mask: list[np.ndarray]
    lengths: list[np.ndarray]
    lines: np.ndarray
    contents: np.ndarray
    fields: list[str]
    counts: Counter[str]
    bad_lines: list[str]

    def save(self, path: Path) -> None:
        """Write it; a shard under its name is whole."""
        arrays = {"lines": self.lines, "contents": self.contents}
        for p in range(len(self.ids)):
            arrays |= {f"ids{p}": self.ids[p], f"mask{p}": self.mask[p]}
            arrays[f"lengths{p}"] = self.lengths[p]
        rest = json.dumps([self.fields, self.counts, self.bad_lines]).encode()
        held = io.BytesIO()
        np.savez(held, rest=np.frombuffer(rest, np.uint8), **arrays)  # type: ignore[arg-type]
        write_whole(path, held.getvalue())

    @classmethod
    def load(cls, path: Path) -> "Shard":
        """What `save` wrote.

        Raises:
            ValueError: it is damaged, as by a machine that went down.
        """
        try:
            return cls._load(path)
        except (OSError, ValueError, LookupError, TypeError, EOFError, zipfile.BadZipFile,
                RecursionError, zlib.error, NotImplementedError) as error:  # fmt: skip
            raise ValueError(
                f"{path}: damaged ({type(error).__name__}): delete it, and the same command makes "
                "it again."
            ) from None

    @classmethod
    def _load(cls, path: Path) -> "Shard":
        with np.load(path, allow_pickle=False) as file:
            parts = range(sum(name.startswith("lengths") for name in file.files))
            fields, counts, bad = json.loads(file["rest"].tobytes())
            ids, mask, lengths = (
                [file[f"{name}{p}"] for p in parts] for name in ("ids", "mask", "lengths")
            )
            lines, contents = file["lines"], file["contents"]
        return cls(ids, mask, lengths, lines, contents, fields, Counter(counts), bad)


def write_whole(path: Path, content: bytes) -> None:
    """Write under another name, then rename: a file under its name is whole."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def work(piece: records.Piece, encoder: Encoder, rules: Rules) -> Shard:
    """The shard of a piece.

    Raises:
        ValueError: a wrong line, with its file and number, unless such lines are skipped.
    """
    samples: list[Sample] = []
    lines: list[int] = []
    bad: list[str] = []
    counts: Counter[str] = Counter()
    for number, raw in records.read(piece):
        counts["records"] += 1
        try:
            with records.at(f"{piece.path}:{number}"):
                sample, note = rules.apply(encoder(records.parse(raw)))
        except ValueError as error:
            if not rules.skip_bad:
                raise
            counts["bad"] += 1
            bad += [str(error)] if len(bad) < SHOWN else []
            continue
        if note:
            counts[note if sample else f"dropped: {note}"] += 1
        if sample:
            samples.append(sample)
            lines.append(number)
    parts = range(len(FORMS[encoder.form]))
    none = [np.empty(0, np.int32)]
    return Shard(
        [np.concatenate(none + [s.parts[p].ids for s in samples]) for p in parts],
        [np.concatenate(none + [s.parts[p].mask for s in samples]).astype(np.uint8) for p in parts],
        [np.array([len(s.parts[p].ids) for s in samples], np.int64) for p in parts],
        np.array(lines, np.int64),
        np.frombuffer(b"".join(s.content() for s in samples), np.uint8).reshape(-1, 16),
        [json.dumps(s.fields, ensure_ascii=False) for s in samples if s.fields is not None], counts,
        bad,
    )  # fmt: skip
