"""Prompts from JSONL: one object a line with `prompt` and, for the reward function, `answer`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dr.data.jsonl import Tokenizer, parse_line, prompt_tokens


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids, its answer (any JSON), and where it is from."""

    text: str
    tokens: tuple[int, ...]
    answer: Any
    origin: str


def read_prompts(
    paths: Sequence[str], tokenizer: Tokenizer, sequence_length: int
) -> list[Prompt]:
    """The prompts of JSONL files, in order.

    Args:
        sequence_length: tokens that prompt and completion have together, at most.

    Raises:
        ValueError: a missing or empty file, or a wrong line: with the file, the line's number and
            what is wrong with it.
    """
    around = set(tokenizer.tokenize(""))
    prompts: list[Prompt] = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file.")
        before = len(prompts)
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.strip():
                    where = f"{path}:{number}"
                    text, answer = _fields(where, parse_line(where, raw))
                    tokens = tuple(prompt_tokens(tokenizer, around, text))
                    _check_room(where, len(tokens), sequence_length)
                    prompts.append(Prompt(text, tokens, answer, where))
        if len(prompts) == before:
            raise ValueError(f"{path}: the file has no prompts.")
    return prompts


def _fields(where: str, record: dict[str, Any]) -> tuple[str, Any]:
    text = record.get("prompt")
    if not isinstance(text, str):
        given = ", ".join(map(repr, record)) or "no field"
        raise ValueError(f"{where}: 'prompt' must be a string; this line has {given}.")
    if not text:
        raise ValueError(f"{where}: 'prompt' is empty.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: 'prompt' has half of a surrogate pair.") from None
    return text, record.get("answer")


def _check_room(where: str, length: int, sequence_length: int) -> None:
    if length == 0:
        raise ValueError(f"{where}: the tokenizer makes no token of 'prompt'.")
    if length >= sequence_length:
        raise ValueError(
            f"{where}: the prompt has {length} tokens and leaves no room for a completion in a "
            f"sequence of {sequence_length}: shorten it or raise --seq-length."
        )
