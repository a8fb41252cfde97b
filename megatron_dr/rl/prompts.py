"""Prompts from files: records with `prompt` and, for the reward function, `answer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.file_samples import read
from megatron_dr.data.messages import Message
from megatron_dr.data.texts import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt as the file has it and as token ids, its answer (any JSON), and where it is from."""

    content: str | list[Message]
    tokens: tuple[int, ...]
    answer: Any
    origin: str


def read_prompts(
    paths: Sequence[str], tokenizer: Tokenizer, sequence_length: int, chat: Chat | None = None
) -> list[Prompt]:
    """The prompts of files and folders (JSONL, Parquet, datasets on disk), in order.

    Args:
        sequence_length: tokens that prompt and completion have together, at most.
        chat: for prompts that are messages; None if the tokenizer has no chat template.

    Raises:
        ValueError: a missing or empty file, or a wrong record: with the file, the line's or row's
            number and what is wrong with it.
    """
    encoder = Encoder("prompts", tokenizer, dict(zip(COLUMNS, COLUMNS, strict=True)), chat)
    prompts: list[Prompt] = []
    for path in paths:
        before = len(prompts)
        for where, record in read(path):
            try:
                part = encoder({"answer": None} | record).parts[0]  # a reward may need no answer
                _check_room(len(part.ids), sequence_length)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            tokens = tuple(part.ids.tolist())
            prompts.append(Prompt(record["prompt"], tokens, record.get("answer"), where))
        if len(prompts) == before:
            raise ValueError(f"{path}: the file has no prompts.")
    return prompts


def _check_room(length: int, sequence_length: int) -> None:
    if length == 0:
        raise ValueError("the tokenizer makes no token of 'prompt'.")
    if length >= sequence_length:
        raise ValueError(
            f"the prompt has {length} tokens and leaves no room for a completion in a sequence of "
            f"{sequence_length}: shorten it or raise --seq-length."
        )
