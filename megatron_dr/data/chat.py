"""Conversations as tokens: the tokenizer's chat template, and a loss on assistant turns alone."""

from typing import Any

import numpy as np

from megatron_dr.data.sample import Part

Message = dict[str, Any]


class Chat:
    """A Hugging Face tokenizer's chat template.

    A template with {% generation %} marks says itself which tokens are the assistant's. Without
    marks, turn i is what rendering the messages 0..i adds to rendering those before it with the
    generation prompt: what the model has to write. White space that the template puts after the
    token that ends a turn belongs to no turn.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        ValueError: no chat template, or a tokenizer that does not say which characters a token is.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template: give one with --chat-template FILE."
            )
        if not tokenizer.is_fast:
            raise ValueError(
                "chat templates need a fast tokenizer: save this one with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.marked = "{% generation" in tokenizer.chat_template.replace("{%-", "{%")

    def encode(self, messages: list[Message], tools: Any = None, given: int = 0) -> Part:
        """Tokens of a conversation, with a loss on assistant turns.

        Args:
            given: so many first messages have no loss.

        Raises:
            ValueError: no assistant turn, or a template that can't be followed.
        """
        turns = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
        trained = [i for i in turns if i >= given]
        if not trained:
            raise ValueError("no message of the assistant to train on.")
        if self.marked:
            return self._encode_marked(messages, tools, skipped=len(turns) - len(trained))
        text = self._render(messages, tools)
        return self._tokens(text, [self._span(messages, i, tools, text) for i in trained])

    def prompt(self, messages: list[Message], tools: Any = None) -> np.ndarray:
        """Tokens after which the assistant is to answer; int32 [length]."""
        return np.asarray(self._ids(self._render(messages, tools, prompt=True)), np.int32)

    def _render(self, messages: list[Message], tools: Any, prompt: bool = False) -> str:
        return str(self._apply(messages, tools, tokenize=False, add_generation_prompt=prompt))

    def _apply(self, messages: list[Message], tools: Any, **how: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how)
        except Exception as error:  # whatever a template's own checks raise
            raise ValueError(f"the chat template refuses the messages ({error}).") from None

    def _encode_marked(self, messages: list[Message], tools: Any, skipped: int) -> Part:
        encoded = self._apply(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        mask = np.array(encoded["assistant_masks"], np.uint8)
        if not mask.any():
            raise ValueError("the chat template's {% generation %} marks hold no text.")
        turn = np.cumsum(np.diff(mask, prepend=0) == 1)  # runs of ones so far
        return Part.of(encoded["input_ids"], mask * (turn > skipped))

    def _span(self, messages: list[Message], i: int, tools: Any, text: str) -> tuple[int, int]:
        """Characters of the whole rendering that turn i writes."""
        before = self._render(messages[:i], tools, prompt=True)
        after = self._render(messages[: i + 1], tools)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"the chat template renders the messages up to number {i + 1} differently when "
                "others follow or when it asks for an answer, so that turn's tokens can't be "
                "found: give a template with {% generation %} marks with --chat-template FILE."
            )
        return len(before), len(after)

    def _tokens(self, text: str, spans: list[tuple[int, int]]) -> Part:
        """Tokens of the text as a whole; cut at the spans if a token reaches across an edge."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = encoded["input_ids"], encoded["offset_mapping"]
        mask = np.zeros(len(ids), np.uint8)
        for start, end in spans:
            if any(a < edge < b for a, b in places for edge in (start, end)):
                return self._in_pieces(text, spans)
            inside = [n for n, (a, b) in enumerate(places) if start <= a and b <= end and a < b]
            mask[self._without_tail(ids, inside)] = 1
        return Part.of(ids, mask)

    def _in_pieces(self, text: str, spans: list[tuple[int, int]]) -> Part:
        """Prompt and answer each on its own: so does a model see them that generates."""
        ids: list[int] = []
        turns: list[int] = []
        place = 0
        for start, end in [*spans, (len(text), len(text))]:
            ids += self._ids(text[place:start])
            answer = self._ids(text[start:end])
            turns += self._without_tail(ids + answer, list(range(len(ids), len(ids) + len(answer))))
            ids += answer
            place = end
        if self.tokenizer.decode(ids) != self.tokenizer.decode(self._ids(text)):
            raise ValueError(
                "the tokenizer joins an answer and the text around it in one token, and changes "
                "the text if they are split there."
            )
        mask = np.zeros(len(ids), np.uint8)
        mask[turns] = 1
        return Part.of(ids, mask)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _without_tail(self, ids: list[int], turn: list[int]) -> list[int]:
        """A turn's places up to the special token that ends it, if only white space follows."""
        special, last = set(self.tokenizer.added_tokens_decoder), len(turn)
        while last and ids[turn[last - 1]] not in special:
            last -= 1
        tail = self.tokenizer.decode([ids[n] for n in turn[last:]])
        return turn[:last] if last and not tail.strip() else turn
