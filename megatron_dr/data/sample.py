"""A sample: token ids and which of them are predicted with a loss."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Part:
    """One sequence: ids int32 [length]; mask uint8 [length], 1 where the token has a loss."""

    ids: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], mask: Sequence[int] | np.ndarray) -> "Part":
        """From lists; the first token has no loss, since nothing comes before it."""
        losses = np.array(mask, np.uint8)
        losses[:1] = 0
        return cls(np.asarray(ids, np.int32), losses)

    def cut(self, length: int) -> "Part":
        """The first `length` tokens."""
        return Part(self.ids[:length], self.mask[:length])


@dataclass(frozen=True)
class Sample:
    """What a record becomes: one sequence, or a preference pair's two.

    Attributes:
        fields: of an RL prompt, the record's other fields.
    """

    parts: tuple[Part, ...]
    fields: dict[str, Any] | None = None

    def content(self, masks: bool = False) -> bytes:
        """Hash of the token ids [16]: samples of equal content are duplicates of each other.

        Args:
            masks: hash which tokens have a loss too.
        """
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(len(part.ids).to_bytes(8, "little"))
            digest.update(part.ids.astype("<i4").tobytes())
            digest.update(part.mask.tobytes() if masks else b"")
        return digest.digest()
