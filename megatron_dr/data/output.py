"""Indexed datasets from shards: tokens, loss masks, sources, and a manifest that comes last."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_dr.data.shards import Shard


class Dataset(Protocol):
    """What is needed of Megatron's IndexedDatasetBuilder."""

    def add_document(self, tensor: Any, lengths: list[int]) -> None: ...

    def finalize(self, idx_path: str) -> None: ...


OpenDataset = Callable[[str, type], Dataset]


@dataclass
class Writer:
    """One output: the samples of one side of the split, in order; a sample's id is its place.

    Files are written in `folder`; `finish` moves them beside one another under their names.

    Args:
        prefix: the output's path without endings.
        parts: what its sequences are called after the prefix, as in encode.FORMS.
        token_type: of the token files.
    """

    prefix: Path
    folder: Path
    parts: tuple[str, ...]
    open_dataset: OpenDataset
    token_type: type

    def __post_init__(self) -> None:
        self.datasets: dict[str, Dataset] = {}
        for part in self.parts:
            for ending, kind in (("", self.token_type), ("_loss_mask", np.uint8)):
                path = self.folder / f"{self.prefix.name}{part}{ending}.bin"
                self.datasets[part + ending] = self.open_dataset(str(path), kind)
        self.sources: list[np.ndarray] = []
        self.lengths: dict[str, list[np.ndarray]] = {part: [] for part in self.parts}
        self.with_loss: Counter[str] = Counter()
        self.largest = dict.fromkeys(self.parts, -1)
        self.answers: Any = None
        self.samples = 0

    def add(self, shard: Shard, file: int, chosen: np.ndarray) -> None:
        """The chosen samples of a shard of the input file with this number; bool [n]."""
        for part, ids, mask, lengths in zip(
            self.parts, shard.ids, shard.mask, shard.lengths, strict=True
        ):
            ends = np.cumsum(lengths)
            for n in np.flatnonzero(chosen):
                where = slice(ends[n] - lengths[n], ends[n])
                self.datasets[part].add_document(ids[where], [int(lengths[n])])
                self.datasets[part + "_loss_mask"].add_document(mask[where], [int(lengths[n])])
                self.with_loss[part] += int(mask[where].sum())
                self.largest[part] = max(self.largest[part], int(ids[where].max(initial=-1)))
            self.lengths[part].append(lengths[chosen])
        lines = shard.lines[chosen]
        self.sources.append(np.stack([np.full_like(lines, file), lines], 1))
        if shard.fields:
            self._add_answers(shard.fields[n] for n in np.flatnonzero(chosen))
        self.samples += len(lines)

    def _add_answers(self, fields: Iterable[str]) -> None:
        if self.answers is None:
            path = self.folder / f"{self.prefix.name}_answers.jsonl"
            self.answers = open(path, "w", encoding="utf-8")
        for number, line in enumerate(fields, self.samples):
            self.answers.write(f'{{"id": {number}, {line[1:]}\n')

    def statistics(self) -> dict[str, dict[str, int]]:
        """Per sequence of the form: samples, tokens, those with a loss, the largest id, lengths."""
        found = {}
        for part, held in self.lengths.items():
            lengths = np.concatenate(held)
            found[part.removeprefix("_") or "tokens"] = {
                "samples": len(lengths), "tokens": int(lengths.sum()),
                "tokens_with_loss": self.with_loss[part], "largest_id": self.largest[part],
                **quantiles(lengths),
            }  # fmt: skip
        return found

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Complete the files and give them their names, the manifest's last of all."""
        for name, dataset in self.datasets.items():
            dataset.finalize(str(self.folder / f"{self.prefix.name}{name}.idx"))
        if self.answers:
            self.answers.close()
        with open(self.folder / f"{self.prefix.name}_source.npy", "wb") as file:
            np.save(file, np.concatenate(self.sources), allow_pickle=False)
        manifest = manifest | {"statistics": self.statistics()}
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        for path in sorted(self.folder.iterdir()):
            os.replace(path, self.prefix.parent / path.name)
        last = self.folder / f"{self.prefix.name}.json"
        last.write_text(text, encoding="utf-8")
        os.replace(last, self.prefix.parent / last.name)
        return manifest


def quantiles(lengths: np.ndarray) -> dict[str, int]:
    """Shortest, longest, and lengths that 50, 90 and 99 % of the samples don't exceed."""
    if not len(lengths):
        return {}
    names = {"shortest": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "longest": 1.0}
    found = np.quantile(lengths, list(names.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(names, found, strict=True)}
