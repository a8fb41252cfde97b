"""Which characters of a rendered conversation the assistant writes, by its chat template."""

import os
import re
from collections.abc import Callable
from typing import Any

from megatron_dr.data.messages import Message, check_rendered, check_roles

Span = tuple[int, int]  # characters of a rendered conversation


class Template:
    """A chat template with the special tokens that it may write.

    With {% generation %} marks it says itself which characters are the assistant's. Without
    marks, turn i is what rendering the messages 0..i adds to rendering those before it with the
    generation prompt: what the model has to write.

    Args:
        text: Jinja.
        special: a tokenizer's special tokens, by name.
        whose: how sentences name it.
        jinja: transformers' `render_jinja_template`.
    """

    def __init__(
        self, text: str, special: dict[str, Any], whose: str, jinja: Callable[..., Any]
    ) -> None:
        self.text, self._special, self._whose, self._jinja = text, special, whose, jinja
        self.marked = re.search(r"\{%-?\s*generation\s*-?%\}", text) is not None

    def checked(self, messages: list[Message], tools: Any) -> str:
        """The conversation rendered.

        Raises:
            ValueError: a role that is misspelt, or what the template can't or does not render.
        """
        check_roles(messages, self.text)
        text = self.render(messages, tools)
        check_rendered(messages, tools, text, self.render)
        return text

    def turns(self, messages: list[Message], tools: Any, given: int) -> tuple[str, list[Span]]:
        """The conversation rendered, and what is the assistant's after the first `given` messages.

        Raises:
            ValueError: as `checked`, or the turns can't be found.
        """
        text = self.checked(messages, tools)
        if self.marked:
            return text, self._marked_spans(messages, tools, text, given)
        turns = (i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= given)
        return text, [self._span(messages, i, tools, text) for i in turns]

    def render(self, messages: list[Message], tools: Any, prompt: bool = False) -> str:
        """What the template makes of messages.

        Raises:
            ValueError: it refuses them.
        """
        return self._rendered(messages, tools, add_generation_prompt=prompt)[0]

    def _rendered(
        self, messages: list[Message], tools: Any, **more: Any
    ) -> tuple[str, list[list[int]]]:
        try:
            (text,), spans = self._jinja(
                [messages], tools=tools, chat_template=self.text, **self._special, **more
            )
        except MemoryError:
            raise
        except Exception as error:  # whatever a template's own checks raise
            why = f"{error}" or type(error).__name__
            raise ValueError(f"{self._whose} refuses the messages ({why:.500}).") from None
        return str(text), spans[0] if spans else []

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
        shown, spans = self._rendered(messages, tools, return_assistant_tokens_mask=True)
        if shown != text:
            raise ValueError("the chat template renders the messages differently each time.")
        found = [(int(start), int(end)) for start, end in spans]
        edges = [0, *(edge for span in found for edge in span), len(text)]
        if edges != sorted(edges):
            raise ValueError("the chat template's {% generation %} marks lie in one another.")
        return found

    def _marks_before(self, given: int, messages: list[Message], tools: Any, marks: int) -> int:
        """How many marks the first messages have: one in each turn, or what they have alone."""
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        if marks == len(turns):
            return sum(i < given for i in turns)
        first = messages[:given]
        return len(self._marks(first, tools, self.render(first, tools)))

    def _span(self, messages: list[Message], i: int, tools: Any, text: str) -> Span:
        """Characters of the whole rendering that turn i writes."""
        if i:
            before = self.render(messages[:i], tools, prompt=True)
        else:
            before = self._start(messages, tools)
        after = self.render(messages[: i + 1], tools)
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
        first = [self.render([messages[0]], tools)]
        words = ("a", "b")
        first += [self.render([messages[0] | {"content": word}], tools) for word in words]
        same = os.path.commonprefix(first)
        asked = self.render([messages[0]], tools, prompt=True).removeprefix(first[0])
        place = same.rfind(asked) if asked else -1
        return same.rstrip() if place < 0 else same[: place + len(asked)]
