"""Texts as tokens: a text whole, and which of its tokens are of which part of it.

A place is (start, end), the characters of a text that a token is.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np

Place = tuple[int, int]
_NEAR = 3  # tokens by which a text's may differ at its end when more text follows


class Tokenizer(Protocol):
    """What is needed of a tokenizer: Megatron's have it."""

    eod: int

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class Texts:
    """A tokenizer's way with texts.

    Attributes:
        ids: the tokens of a text, nothing around them.
        placed: the same with their places; None: the tokenizer does not tell them.
        decode: the text of tokens.
        before: what the tokenizer puts before every text, as a BOS.
    """

    ids: Callable[[str], list[int]]
    placed: Callable[[str], tuple[list[int], list[Place]]] | None
    decode: Callable[[list[int]], str]
    before: tuple[int, ...] = ()

    def begun(self, ids: list[int]) -> list[int]:
        """With what the tokenizer puts before a text, unless the text begins with it."""
        before = list(self.before)
        return ids if ids[: len(before)] == before else before + ids

    def split(self, pieces: Sequence[str]) -> list[list[int]]:
        """The tokens of each piece; together they are those of the joined text.

        Where one of these would reach from a piece into the next, each piece is tokenised apart, as
        a model that has read the pieces before it writes it.

        Raises:
            ValueError: no tokens of the pieces apart give the text.
        """
        text = "".join(pieces)
        edges = list(accumulate(map(len, pieces)))[:-1]
        if self.placed is None:
            ids = self.ids(text)
            cuts = [self._cut_by_text(ids, text[:edge]) for edge in edges]
        else:
            ids, places = self.placed(text)
            ends = np.array(places, np.int64).reshape(-1, 2)
            cuts = [_cut(ends, edge) for edge in edges]
        found = [cut for cut in cuts if cut is not None]
        if len(found) < len(cuts):
            return self._apart(pieces)
        return [ids[a:b] for a, b in pairwise([0, *found, len(ids)])]

    def _cut_by_text(self, ids: list[int], start: str) -> int | None:
        """How many first tokens are the start of the text; None: none are."""
        alone = self.ids(start)
        if ids[: len(alone)] == alone:
            return len(alone)
        wanted = self.decode(alone)
        near = range(max(len(alone) - _NEAR, 0), min(len(alone) + _NEAR, len(ids)) + 1)
        return next((n for n in near if self.decode(ids[:n]) == wanted), None)

    def _apart(self, pieces: Sequence[str]) -> list[list[int]]:
        text, before = "", list[int]()
        split: list[list[int]] = []
        for piece in pieces:
            text += piece
            wanted = self.decode(self.ids(text))
            ways = self._ways(piece) if before else [self.ids(piece)]
            found = next((ids for ids in ways if self.decode(before + ids) == wanted), None)
            if found is None:
                raise ValueError(
                    "the tokenizer joins an answer and the text around it in one token, and "
                    "changes the text if they are split there: move the white space between them "
                    "into the answer."
                )
            split.append(found)
            before += found
        return split

    def _ways(self, piece: str) -> list[list[int]]:
        """Tokens that may be the piece's where other text is before it.

        A tokenizer that begins every text with a space begins this one so too, if it is by itself.
        """
        ways = [self.ids(piece)] if piece else [[]]
        for start in ("\n", "."):
            if self.placed is None:
                ids = self.ids(start + piece)
                cut = self._cut_by_text(ids, start)
            else:
                ids, places = self.placed(start + piece)
                cut = _cut(np.array(places, np.int64).reshape(-1, 2), len(start))
            ways += [] if cut is None else [ids[cut:]]
        return ways


def _cut(places: np.ndarray, edge: int) -> int | None:
    """How many tokens are before the edge; None where one reaches over it. places [n, 2]."""
    first = places[:, 0] < edge
    cut = int(first.sum())
    over = (places[:cut, 1] > edge).any() or not first[:cut].all()
    return None if over else cut


def texts_of(tokenizer: Tokenizer) -> Texts:
    """Of one of Megatron's tokenizers.

    Raises:
        ValueError: it does not take text.
    """
    try:
        around, probe = tokenizer.tokenize(""), tokenizer.tokenize("a")
    except ValueError as error:
        raise ValueError(
            f"the tokenizer takes no text ({error}): give --tokenizer-type one that does, or "
            "prepare the data before."
        ) from None
    same = (n for n, (a, b) in enumerate(zip(around, probe, strict=False)) if a != b)
    first = next(same, min(len(around), len(probe)))
    before, last = tuple(around[:first]), len(around) - first
    inner = hugging_face(tokenizer)
    if inner is not None:
        own = texts_of_hugging_face(inner)
        return Texts(own.ids, own.placed, own.decode, before)

    def ids(text: str) -> list[int]:
        whole = list(tokenizer.tokenize(text))
        return whole[first : len(whole) - last]

    return Texts(ids, None, lambda ids: tokenizer.detokenize(ids), before)


def texts_of_hugging_face(tokenizer: Any) -> Texts:
    """Of a tokenizer of Hugging Face, with nothing before a text.

    A fast one's post-processor is left out: it puts tokens around texts, and with `trim_offsets`,
    which is the `tokenizers` library's default, white space has no place.
    """
    plain = copy.deepcopy(tokenizer)
    if plain.is_fast:
        plain.backend_tokenizer.post_processor = None

    def ids(text: str) -> list[int]:
        return list(plain(text, add_special_tokens=False, verbose=False)["input_ids"])

    def placed(text: str) -> tuple[list[int], list[Place]]:
        encoded = plain(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), encoded["offset_mapping"]

    def decode(ids: list[int]) -> str:
        text: str = plain.decode(ids, clean_up_tokenization_spaces=False)
        return text

    return Texts(ids, placed if plain.is_fast else None, decode)


def hugging_face(tokenizer: Any) -> Any:
    """The tokenizer of Hugging Face in one of Megatron's; None: it is of another kind."""
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    return inner if hasattr(inner, "chat_template") else None
