"""Samples straight from files: JSONL, Parquet and datasets on disk, tokenised at the start."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megatron_dr.data import records
from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder, Tokenizer
from megatron_dr.data.packing import padded
from megatron_dr.data.sample import Part


class Padded(ABC):
    """Samples as padded sequences.

    Attributes:
        sequence_length: L.
        pad: token that fills a sequence.
        attention_mask: give a causal mask [1, L, L] too, True where attention is forbidden.
    """

    sequence_length: int
    pad: int
    attention_mask: bool

    @abstractmethod
    def part(self, number: int) -> Part:
        """The sample itself, cut to one token more than the sequence."""

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, loss_mask, position_ids, each [L], padded on the right."""
        sample = padded(self.part(number), self.sequence_length, self.pad)
        if self.attention_mask:
            sample["attention_mask"] = causal_mask(self.sequence_length)
        return sample


class FileSamples(Padded):
    """The samples of a file or folder, tokenised once and kept in memory.

    A record has `text`, trained on whole; `prompt` and `response`, trained on the response and the
    end-of-document token; or `messages`, trained on what the assistant says. A sample longer than
    the sequence is cut on the right.

    Args:
        path: a file or folder that `records.list_files` knows.
        sequence_length: L; a sample gives L inputs and L labels.
        chat: for messages; None if the tokenizer has no chat template.
        attention_mask: give a causal mask [1, L, L] too, True where attention is forbidden.

    Raises:
        ValueError: a missing or empty file, or a wrong record: with the file, the line's or row's
            number and what is wrong with it.
    """

    def __init__(
        self, path: str, tokenizer: Tokenizer, sequence_length: int, chat: Chat | None = None,
        attention_mask: bool = False,
    ) -> None:  # fmt: skip
        self.path = path
        self.sequence_length = sequence_length
        self.attention_mask = attention_mask
        self.pad = tokenizer.eod
        self.num_cut = 0
        self._parts: list[Part] = []
        encoder = Encoder("sft", tokenizer, dict(zip(COLUMNS, COLUMNS)), chat)
        for where, record in read(path):
            with records.at(where):
                self._parts.append(self._cut(encoder(record).parts[0]))
        if not self._parts:
            raise ValueError(f"{path}: the file has no samples.")

    def _cut(self, part: Part) -> Part:
        cut = part.cut(self.sequence_length + 1)
        if not cut.mask.any():
            first = int(part.mask.argmax())
            raise ValueError(
                f"the prompt has {first} tokens and leaves no room for the response in a sequence "
                f"of {self.sequence_length}: shorten it or raise --seq-length."
            )
        self.num_cut += len(part.ids) > len(cut.ids)
        return cut

    def __len__(self) -> int:
        return len(self._parts)

    def part(self, number: int) -> Part:
        return self._parts[number]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample [n]."""
        return np.array([len(part.ids) for part in self._parts])


def read(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:number, record) of every record of a file or folder, in order.

    Raises:
        ValueError: no such data, or a line that is no record.
    """
    for file in records.list_files([path]):
        for number, raw in records.read_file(file):
            where = f"{file}:{number}"
            with records.at(where):
                record = records.parse(raw)
            yield where, record


def causal_mask(length: int) -> torch.Tensor:
    """[1, length, length], True where attention is forbidden."""
    return torch.ones(1, length, length, dtype=torch.bool).triu(1)
