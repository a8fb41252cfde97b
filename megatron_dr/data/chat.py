"""Conversations as tokens: the tokenizer's chat template, and a loss on assistant turns alone."""

from typing import Any

import numpy as np

from megatron_dr.data.messages import Message
from megatron_dr.data.rendering import Templates
from megatron_dr.data.sample import Part
from megatron_dr.data.texts import texts_of_hugging_face


class Chat:
    """A Hugging Face tokenizer's chat template.

    Which characters of a conversation are the assistant's, `turns.Template` finds. White space
    that the template puts after the token that ends a turn belongs to no turn.

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
        self._templates = Templates(tokenizer)
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
        if not any(m.get("role") == "assistant" for m in messages[given:]):
            raise ValueError("no message of the assistant to train on.")
        found = self._templates.render("turns", messages, tools, given=given)
        text = found.text
        pieces, place = [], 0
        for start, end in found.spans:
            pieces += [text[place:start], text[start:end]]
            place = end
        split = self._texts.split([*pieces, text[place:]])
        masks = [np.zeros(len(ids), np.uint8) for ids in split]
        for ids, mask in zip(split[1::2], masks[1::2], strict=True):
            mask[: len(ids) if found.marked else self._end(ids)] = 1
        return Part.of([i for ids in split for i in ids], np.concatenate(masks))

    def prompt(self, messages: list[Message], tools: Any = None) -> np.ndarray:
        """Tokens after which the assistant is to answer; int32 [length].

        Raises:
            ValueError: what the template can't or does not render.
        """
        tools = tools or None
        text = self._templates.render("prompt", messages, tools).text
        return np.asarray(self._texts.ids(text), np.int32)

    def end(self, messages: list[Message], tools: Any = None) -> int | None:
        """The special token that the last turn, the assistant's, is trained to end with.

        Raises:
            ValueError: as `encode`.
        """
        part = self.encode(messages, tools, len(messages) - 1)
        last = int(part.ids[part.mask.nonzero()[0][-1]])
        return last if last in self._special else None

    def _end(self, ids: list[int]) -> int:
        """A turn's tokens up to the special token that ends it, if only white space follows."""
        last = len(ids)
        while last and ids[last - 1] not in self._special:
            last -= 1
        return last if last and not self._texts.decode(ids[last:]).strip() else len(ids)
