"""Conversations as tokens: the tokenizer's chat template, and a loss on assistant turns alone."""

import os
import re
from typing import Any

import numpy as np

from megatron_dr.data.messages import Message, check_rendered, check_roles
from megatron_dr.data.sample import Part
from megatron_dr.data.texts import texts_of_hugging_face

Span = tuple[int, int]  # characters of a rendered conversation


class Chat:
    """A Hugging Face tokenizer's chat template.

    A template with {% generation %} marks says itself which characters are the assistant's. Without
    marks, turn i is what rendering the messages 0..i adds to rendering those before it with the
    generation prompt: what the model has to write. White space that the template puts after the
    token that ends a turn belongs to no turn.

    Of several named templates it is the one that transformers takes: `tool_use` for messages with
    tools, if there is one, else `default`.

    Args:
        tokenizer: one with a chat template.

    Raises:
        ValueError: no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: give one with --chat-template FILE."
            )
        self.tokenizer = tokenizer
        self._texts = texts_of_hugging_face(tokenizer)
        self._special = set(tokenizer.added_tokens_decoder)

    def encode(self, messages: list[Message], tools: Any = None, given: int = 0) -> Part:
        """Tokens of a conversation, with a loss on assistant turns.

        Args:
            given: so many first messages have no loss.

        Raises:
            ValueError: no assistant turn, or what the template can't or does not render.
        """
        tools = tools or None
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        trained = [i for i in turns if i >= given]
        if not trained:
            raise ValueError("no message of the assistant to train on.")
        text = self._checked(messages, tools)
        marked = re.search(r"\{%-?\s*generation\s*-?%\}", self._template(tools)) is not None
        if marked:
            spans = self._marked_spans(messages, tools, text, given)
        else:
            spans = [self._span(messages, i, tools, text) for i in trained]
        pieces, place = [], 0
        for start, end in spans:
            pieces += [text[place:start], text[start:end]]
            place = end
        split = self._texts.split([*pieces, text[place:]])
        masks = [np.zeros(len(ids), np.uint8) for ids in split]
        for ids, mask in zip(split[1::2], masks[1::2], strict=True):
            mask[: len(ids) if marked else self._end(ids)] = 1
        return Part.of([i for ids in split for i in ids], np.concatenate(masks))

    def prompt(self, messages: list[Message], tools: Any = None) -> np.ndarray:
        """Tokens after which the assistant is to answer; int32 [length].

        Raises:
            ValueError: what the template can't or does not render.
        """
        tools = tools or None
        self._checked(messages, tools)
        return np.asarray(self._texts.ids(self._render(messages, tools, prompt=True)), np.int32)

    def end(self, messages: list[Message], tools: Any = None) -> int | None:
        """The special token that the last turn, the assistant's, is trained to end with.

        Raises:
            ValueError: as `encode`.
        """
        part = self.encode(messages, tools, len(messages) - 1)
        last = int(part.ids[part.mask.nonzero()[0][-1]])
        return last if last in self._special else None

    def _template(self, tools: Any) -> str:
        return str(self.tokenizer.get_chat_template(tools=tools))

    def _checked(self, messages: list[Message], tools: Any) -> str:
        """The conversation rendered."""
        check_roles(messages, self._template(tools))
        text = self._render(messages, tools)
        check_rendered(messages, tools, text, self._render)
        return text

    def _render(self, messages: list[Message], tools: Any, prompt: bool = False) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            ))  # fmt: skip
        except Exception as error:  # whatever a template's own checks raise
            raise ValueError(f"the chat template refuses the messages ({error}).") from None

    def _marked_spans(
        self, messages: list[Message], tools: Any, text: str, given: int
    ) -> list[Span]:
        """What the template marks in the messages after the given ones."""
        spans = self._marks(messages, tools, text)
        if given:
            spans = spans[self._marks_before(given, messages, tools, len(spans)) :]
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            raise ValueError("the chat template's {% generation %} marks hold no text.")
        return spans

    def _marks(self, messages: list[Message], tools: Any, text: str) -> list[Span]:
        """All that it marks: of the text, since tokens' own masks come from trimmed places."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [messages], tools=tools, chat_template=self._template(tools),
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        (shown,), (spans,) = rendered
        if shown != text:
            raise ValueError("the chat template renders the messages differently each time.")
        return [(int(start), int(end)) for start, end in spans]

    def _marks_before(self, given: int, messages: list[Message], tools: Any, marks: int) -> int:
        """How many marks the first messages have: one in each turn, or what they have alone."""
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if marks == len(turns):
            return sum(i < given for i in turns)
        first = messages[:given]
        return len(self._marks(first, tools, self._render(first, tools)))

    def _span(self, messages: list[Message], i: int, tools: Any, text: str) -> Span:
        """Characters of the whole rendering that turn i writes."""
        if i:
            before = self._render(messages[:i], tools, prompt=True)
        else:
            before = self._start(messages, tools)
        after = self._render(messages[: i + 1], tools)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"the chat template renders the messages up to number {i + 1} differently when "
                "others follow or when it asks for an answer, so that turn's tokens can't be "
                "found: give a template with {% generation %} marks with --chat-template FILE "
                "(for Qwen 3 --chat-template qwen3)."
            )
        return len(before), len(after)

    def _start(self, messages: list[Message], tools: Any) -> str:
        """What is before the words of a conversation's first turn.

        No template renders nothing at all, so it is what stays where the words change, up to the
        end of what the generation prompt adds, if that is in it.
        """
        first = [self._render([messages[0]], tools)]
        words = ("a", "b")
        first += [self._render([messages[0] | {"content": word}], tools) for word in words]
        same = os.path.commonprefix(first)
        asked = self._render([messages[0]], tools, prompt=True).removeprefix(first[0])
        place = same.rfind(asked) if asked else -1
        return same.rstrip() if place < 0 else same[: place + len(asked)]

    def _end(self, ids: list[int]) -> int:
        """A turn's tokens up to the special token that ends it, if only white space follows."""
        last = len(ids)
        while last and ids[last - 1] not in self._special:
            last -= 1
        return last if last and not self._texts.decode(ids[last:]).strip() else len(ids)
