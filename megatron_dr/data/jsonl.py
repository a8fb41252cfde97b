"""JSONL samples: one JSON object a line with `text`, or with `prompt` and `response`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_dr.data.packing import padded
from megatron_dr.data.sample import Part


class Tokenizer(Protocol):
    """What is needed of a tokenizer: Megatron's have it."""

    eod: int

    def tokenize(self, text: str) -> list[int]: ...


class JsonlSamples:
    """The samples of a JSONL file, tokenised once and kept in memory as int32.

    `text` is trained on whole, a `response` alone (its prompt is context); both end with the
    tokenizer's end-of-document token. A sample longer than the sequence is cut on the right.

    Args:
        path: the file, UTF-8.
        sequence_length: L; a sample gives L inputs and L labels.
        attention_mask: give a causal mask [1, L, L] too, True where attention is forbidden.

    Raises:
        ValueError: a missing or empty file, or a wrong line: with the file, the line's number and
            what is wrong with it.
    """

    def __init__(
        self, path: str, tokenizer: Tokenizer, sequence_length: int, attention_mask: bool = False
    ) -> None:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file.")
        self.path = path
        self.sequence_length = sequence_length
        self.attention_mask = attention_mask
        self.pad = tokenizer.eod
        self.num_cut = 0
        self._tokens: list[np.ndarray] = []
        self._first: list[int] = []  # position of the first token that has a loss
        # What a tokenizer puts around every text (Llama's <bos>) belongs around the sample, and
        # not between its parts.
        around = set(tokenizer.tokenize(""))
        for number, prompt, text in _lines(path):
            ids, num_prompt = join(tokenizer, around, prompt, text)
            self.num_cut += len(ids) > sequence_length + 1
            ids = ids[: sequence_length + 1]
            first = max(num_prompt, 1)
            if first >= len(ids):
                raise ValueError(
                    f"{path}:{number}: the prompt has {num_prompt} tokens and leaves no room "
                    f"for the response in a sequence of {sequence_length}: shorten it or raise "
                    "--seq-length."
                )
            self._tokens.append(np.asarray(ids, dtype=np.int32))
            self._first.append(first)
        if not self._tokens:
            raise ValueError(f"{path}: the file has no samples.")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, loss_mask, position_ids, each [L], padded on the right."""
        sample = padded(self.part(number), self.sequence_length, self.pad)
        if self.attention_mask:
            sample["attention_mask"] = causal_mask(self.sequence_length)
        return sample

    def part(self, number: int) -> Part:
        """The sample itself."""
        ids = self._tokens[number]
        return Part(ids, (np.arange(len(ids)) >= self._first[number]).astype(np.uint8))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample [n]."""
        return np.array([len(ids) for ids in self._tokens])


def causal_mask(length: int) -> torch.Tensor:
    """[1, length, length], True where attention is forbidden."""
    return torch.ones(1, length, length, dtype=torch.bool).triu(1)


def join(
    tokenizer: Tokenizer, around: set[int], prompt: str, text: str
) -> tuple[list[int], int]:
    """Token ids of prompt, text and end of document; and how many of them are the prompt's.

    Args:
        around: the tokens of the empty text, which the tokenizer puts around every text.
    """
    prompt_ids = prompt_tokens(tokenizer, around, prompt) if prompt else []
    text_ids = _strip(tokenizer.tokenize(text), around, start=bool(prompt))
    return prompt_ids + text_ids + [tokenizer.eod], len(prompt_ids)


def prompt_tokens(tokenizer: Tokenizer, around: set[int], prompt: str) -> list[int]:
    """Token ids of a text that another follows."""
    return _strip(tokenizer.tokenize(prompt), around)


def _strip(ids: list[int], around: set[int], start: bool = False) -> list[int]:
    """Without the tokens in `around` at the end and, if asked for, at the start."""
    first, last = 0, len(ids)
    while start and first < last and ids[first] in around:
        first += 1
    while last > first + 1 and ids[last - 1] in around:
        last -= 1
    return list(ids[first:last])


def _lines(path: str) -> Iterator[tuple[int, str, str]]:
    """(line number, prompt or '', text or response) of every line that is not empty."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            yield number, *_fields(where, parse_line(where, raw))


def parse_line(where: str, raw: bytes) -> dict[str, Any]:
    """The JSON object of a line; ValueError, beginning with `where`, if it is none."""
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason}).") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}).") from None
    except (ValueError, RecursionError) as error:  # a huge number, deep nesting
        raise ValueError(f"{where}: JSON that can't be read ({error}).") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a line must be a JSON object, not {type(record).__name__}.")
    return record


def _fields(where: str, record: dict[str, Any]) -> tuple[str, str]:
    has_text, has_pair = "text" in record, "prompt" in record or "response" in record
    if has_text == has_pair:
        raise ValueError(
            f"{where}: a line must have either 'text', or 'prompt' and 'response'; this one has "
            f"{', '.join(map(repr, record)) or 'no field'}."
        )
    names = ("text",) if has_text else ("prompt", "response")
    for name in names:
        if not isinstance(record.get(name), str):
            raise ValueError(f"{where}: {name!r} must be a string.")
        try:
            record[name].encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {name!r} has half of a surrogate pair.") from None
    last = record[names[-1]]
    if not last.strip():
        raise ValueError(f"{where}: {names[-1]!r} is empty.")
    return ("" if has_text else record["prompt"]), last
