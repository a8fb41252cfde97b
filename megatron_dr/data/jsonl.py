"""A line of JSONL, and a sample's texts as tokens."""

import json
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What is needed of a tokenizer: Megatron's have it."""

    eod: int

    def tokenize(self, text: str) -> list[int]: ...


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
