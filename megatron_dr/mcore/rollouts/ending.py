"""Where completions end."""

from collections.abc import Callable, Collection, Sequence


class Ending:
    """Whether a completion is over after its newest token.

    Args:
        ids: tokens that end it.
        strings: texts that end it, with the token that completes one of them.
        decode: token ids to text, for the strings.

    Raises:
        ValueError: for a string that is empty, or strings without `decode`.
    """

    def __init__(
        self, ids: Collection[int], strings: Sequence[str],
        decode: Callable[[list[int]], str] | None,
    ) -> None:  # fmt: skip
        if isinstance(strings, str) or "" in strings:
            raise ValueError("stop must be a tuple of strings that are not empty.")
        if strings and decode is None:
            raise ValueError("stop strings need a tokenizer: pass decode, or use stop_tokens.")
        self.ids = frozenset(ids)
        self.strings = tuple(strings)
        self.decode = decode
        # A token has a byte at least, so a string that just ended lies within so many tokens. Of
        # the four before it, the first may lose its leading space or its share of a character.
        self.window = max((len(s.encode()) for s in strings), default=0) + 4

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the last of a completion's tokens ends it."""
        if tokens[-1] in self.ids:
            return True
        if not self.strings or self.decode is None:
            return False
        text = self.decode(list(tokens[-self.window :]))
        return any(string in text for string in self.strings)
