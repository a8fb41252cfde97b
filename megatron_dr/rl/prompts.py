"""Prompts from files: records with `prompt` and, for the reward function, `answer`; samples that
are trained on, as prompts with their references."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dr.data import records
from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.file_samples import read
from megatron_dr.data.messages import Message, checked, text_of
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
    make = _Maker(tokenizer, sequence_length, chat)
    prompts: list[Prompt] = []
    for path in paths:
        before = len(prompts)
        for where, record in read(path):
            with records.at(where):
                prompts.append(make(record, where))
        if len(prompts) == before:
            raise ValueError(f"{path}: the file has no prompts.")
    return prompts


@dataclass(frozen=True)
class Asked:
    """A sample as a question.

    Attributes:
        prompt: its `answer`, for a reward function, is the record's; without one, the reference.
        reference: the text that the sample answers with.
        end: the special token that ends a turn in the chat template; None: text, or it has none.
    """

    prompt: Prompt
    reference: str
    end: int | None = None


def read_asked(
    path: str, tokenizer: Tokenizer, sequence_length: int, chat: Chat | None = None
) -> list[Asked]:
    """The samples of a file or folder as questions, in order: what `question` takes.

    Raises:
        ValueError: as `read_prompts`, and for what is no question.
    """
    make = _Maker(tokenizer, sequence_length, chat)
    found: list[Asked] = []
    for where, record in read(path):
        with records.at(where):
            asked, reference = question(record)
            prompt = make(asked, where)
            end = None
            if chat is not None and "messages" in record:
                end = chat.end(checked("messages", record["messages"]), record.get("tools"))
            found.append(Asked(prompt, reference, end))
    if not found:
        raise ValueError(f"{path}: the file has no samples.")
    return found


def question(record: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(the prompt's record, its reference): of `prompt` and `response`, or of `messages` whose last
    one is the assistant's.

    Raises:
        ValueError: neither is there, or the reference is no text.
    """
    if "messages" in record:
        *before, last = checked("messages", record["messages"])
        if last["role"] != "assistant" or not before:
            raise ValueError(
                "'messages' must end with the assistant's answer to those before it, to be "
                "compared with."
            )
        prompt, reference = before, text_of(last)
    elif {"prompt", "response"} <= record.keys():
        prompt, reference = record["prompt"], record["response"]
    else:
        raise ValueError(
            "a sample whose answer is generated must have 'prompt' with 'response', or 'messages'; "
            f"this one has {', '.join(map(repr, record)) or 'no column'}."
        )
    if not isinstance(reference, str) or not reference.strip():
        raise ValueError("the answer to compare with has no text.")
    more = {"tools": record["tools"]} if "tools" in record else {}
    return {"prompt": prompt, "answer": record.get("answer", reference), **more}, reference


class _Maker:
    """Records to prompts; the sentence of a ValueError says what is wrong."""

    def __init__(self, tokenizer: Tokenizer, sequence_length: int, chat: Chat | None) -> None:
        self.encode = Encoder("prompts", tokenizer, dict(zip(COLUMNS, COLUMNS, strict=True)), chat)
        self.length = sequence_length

    def __call__(self, record: dict[str, Any], where: str) -> Prompt:
        ids = self.encode({"answer": None} | record).parts[0].ids  # a reward may need no answer
        _check_room(len(ids), self.length)
        return Prompt(record["prompt"], tuple(ids.tolist()), record.get("answer"), where)


def _check_room(length: int, sequence_length: int) -> None:
    if length == 0:
        raise ValueError("the tokenizer makes no token of 'prompt'.")
    if length >= sequence_length:
        raise ValueError(
            f"the prompt has {length} tokens and leaves no room for a completion in a sequence of "
            f"{sequence_length}: shorten it or raise --seq-length."
        )
