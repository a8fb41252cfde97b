"""From a record's columns to a sample's tokens: text, answers, conversations, pairs, prompts."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_dr.data.chat import Chat
from megatron_dr.data.messages import Message, check_unicode, checked
from megatron_dr.data.sample import Part, Sample
from megatron_dr.data.texts import Tokenizer, texts_of

COLUMNS = ("text", "prompt", "response", "messages", "chosen", "rejected", "answer", "tools")
# Of a form, what its sequences' files are called after the output's prefix.
FORMS = {"sft": ("",), "preference": ("_chosen", "_rejected"), "prompts": ("",)}


def form_of(names: Iterable[str], columns: dict[str, str]) -> str:
    """The form of a record with these columns."""
    has = {name for name, column in columns.items() if column in set(names)}
    if {"chosen", "rejected"} & has:
        return "preference"
    return "prompts" if "answer" in has and not has & {"text", "response", "messages"} else "sft"


class Encoder:
    """Samples of one form.

    Args:
        form: one of FORMS.
        columns: what the data calls each of COLUMNS.
        chat: for records with messages; None if the tokenizer has no chat template.
    """

    def __init__(
        self, form: str, tokenizer: Tokenizer, columns: dict[str, str], chat: Chat | None
    ) -> None:
        self.form, self.columns, self.chat, self.eod = form, columns, chat, tokenizer.eod
        self.texts = texts_of(tokenizer)

    def __call__(self, record: dict[str, Any]) -> Sample:
        """The sample of a record.

        Raises:
            ValueError: missing, empty or wrong columns.
        """
        make = {"sft": self._sft, "preference": self._preference, "prompts": self._prompt}
        return make[self.form](record)

    def _sft(self, record: dict[str, Any]) -> Sample:
        kinds = [kind for kind in ("text", "response", "messages") if self.columns[kind] in record]
        if len(kinds) != 1:
            columns = self.columns
            raise ValueError(
                f"a record must have one of {columns['text']!r}, {columns['prompt']!r} with "
                f"{columns['response']!r}, or {columns['messages']!r}; this one has "
                f"{', '.join(map(repr, record)) or 'no column'}."
            )
        if kinds == ["messages"]:
            messages = self._messages(record, "messages")
            return Sample((self._chat().encode(messages, self._tools(record)),))
        if kinds == ["text"]:
            return Sample((self._pair("", self._text(record, "text")),))
        prompt = self._text(record, "prompt", empty=True)
        return Sample((self._pair(prompt, self._text(record, "response")),))

    def _preference(self, record: dict[str, Any]) -> Sample:
        names = ("chosen", "rejected")
        if not isinstance(record.get(self.columns["chosen"]), list):
            prompt = self._text(record, "prompt") if self.columns["prompt"] in record else ""
            parts = [self._pair(prompt, self._text(record, name)) for name in names]
        else:
            first = self._messages(record, "prompt") if self.columns["prompt"] in record else []
            both = [self._messages(record, name) for name in names]
            if not all(m[: len(first)] == first for m in both):
                both = [first + messages for messages in both]
            given, tools = _common(*both), self._tools(record)
            parts = [self._chat().encode(messages, tools, given) for messages in both]
        if np.array_equal(parts[0].ids, parts[1].ids):
            raise ValueError("the chosen and the rejected answer are the same.")
        return Sample(tuple(parts))

    def _prompt(self, record: dict[str, Any]) -> Sample:
        if self.columns["answer"] not in record:
            raise ValueError(f"no column {self.columns['answer']!r}.")
        if isinstance(record.get(self.columns["prompt"]), list):
            messages = self._messages(record, "prompt")
            ids = self._chat().prompt(messages, self._tools(record))
        else:
            text = self._text(record, "prompt")
            ids = np.asarray(self.texts.begun(self.texts.ids(text)), np.int32)
        fields = {"answer": record[self.columns["answer"]]}
        left = {self.columns["prompt"], self.columns["answer"]}
        fields |= {k: v for k, v in record.items() if k not in left | {"answer", "id"}}
        if "id" in record:  # ours is the document's number
            fields["source_id"] = record["id"]
        for column, value in fields.items():
            check_unicode(column, [column, value])
        try:
            json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"a column that JSON can't hold ({error}).") from None
        return Sample((Part(ids, np.zeros(len(ids), np.uint8)),), fields)

    def _pair(self, prompt: str, text: str) -> Part:
        """Prompt, text and end of document, as one text; a loss on the last two.

        A text that has its end already, as one rendered by a chat template, gets no second one, and
        white space after it has no loss.
        """
        if prompt:
            before, after = self.texts.split((prompt, text))
        else:
            before, after = [], self.texts.ids(text)
        last = len(after) - after[::-1].index(self.eod) if self.eod in after else 0
        if not last or self.texts.decode(after[last:]).strip():
            after = [*after, self.eod]
            last = len(after)
        ids = self.texts.begun(before + after)
        mask = np.zeros(len(ids), np.uint8)
        mask[len(ids) - len(after) : len(ids) - len(after) + last] = 1
        return Part.of(ids, mask)

    def _chat(self) -> Chat:
        if self.chat is None:
            raise ValueError(
                "messages need a tokenizer with a chat template: a folder of tokenizer.json with "
                "one, or --chat-template."
            )
        return self.chat

    def _text(self, record: dict[str, Any], name: str, empty: bool = False) -> str:
        column = self.columns[name]
        text = record.get(column)
        if not isinstance(text, str):
            found = type(text).__name__ if column in record else "absent"
            raise ValueError(f"{column!r} must be a string, and is {found}.")
        if not text.strip() and not empty:
            raise ValueError(f"{column!r} is empty.")
        check_unicode(column, text)
        return text

    def _messages(self, record: dict[str, Any], name: str) -> list[Message]:
        column = self.columns[name]
        return checked(column, record.get(column))

    def _tools(self, record: dict[str, Any]) -> Any:
        tools = record.get(self.columns["tools"])
        check_unicode(self.columns["tools"], tools)
        return tools


def _common(a: list[Message], b: list[Message]) -> int:
    """How many first messages are the same in both."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))
