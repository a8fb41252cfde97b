"""Samples straight from files and folders of them, tokenised at the start."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_dr.data import files, records
from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.identities import Identities, Identity
from megatron_dr.data.packing import Padded
from megatron_dr.data.sample import Part
from megatron_dr.data.texts import Tokenizer


class FileSamples(Padded):
    """The samples of a file or folder, tokenised once and kept in memory.

    A record has `text`, trained on whole; `prompt` and `response`, trained on the response and the
    end-of-document token; or `messages`, trained on what the assistant says. A sample longer than
    the sequence is cut on the right.

    Args:
        path: a file or folder that `files.list_files` knows.
        sequence_length: L; a sample gives L inputs and L labels.
        chat: for messages; None if the tokenizer has no chat template.
        attention_mask: as `Padded`.

    Raises:
        ValueError: a missing or empty file, or a wrong record: with the file, the line's or row's
            number and what is wrong with it.
    """

    def __init__(
        self, path: str, tokenizer: Tokenizer, sequence_length: int, chat: Chat | None = None,
        attention_mask: bool = False,
    ) -> None:  # fmt: skip
        self.sequence_length = sequence_length
        self.attention_mask = attention_mask
        self.pad = tokenizer.eod
        self.num_cut = 0
        self._parts, self._identities = list[Part](), Identities()
        encoder = Encoder("sft", tokenizer, dict(zip(COLUMNS, COLUMNS, strict=True)), chat)
        for where, record in read(path):
            with records.at(where):
                self._parts.append(self._cut(encoder(record).parts[0]))
            self._identities.add(where, record)
        if not self._parts:
            raise ValueError(f"{path}: the file has no samples.")
        self.lengths = np.array([len(part.ids) for part in self._parts])

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

    def part(self, number: int) -> Part:
        return self._parts[number]

    def identity(self, number: int) -> Identity:
        """Who the sample is."""
        return self._identities[number]

    def origin(self, number: int) -> str:
        """Its file and line."""
        return self._identities[number].place


def read(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:number, record) of every record of a file or folder, in order.

    Raises:
        ValueError: no such data, or a line that is no record.
    """
    for file in files.list_files([path]):
        for number, raw in records.read_file(file):
            where = f"{file}:{number}"
            with records.at(where):
                record = records.parse(raw)
            yield where, record
