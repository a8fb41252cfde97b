"""Preference pairs: two answers to a prompt, checked at the start, as tensors to train on."""

from abc import ABC, abstractmethod

import numpy as np
import torch

from megatron_dr.data import records
from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.file_samples import read
from megatron_dr.data.identities import Identities, Identity
from megatron_dr.data.packing import causal_mask, padded
from megatron_dr.data.sample import Part, Sample
from megatron_dr.data.texts import Tokenizer

Pair = tuple[Part, Part]  # chosen, rejected


class Pairs(ABC):
    """Pairs by number; a subclass says where they are.

    Args:
        path: what they were read from.
        sequence_length: L; an answer with its prompt gives L inputs and L labels.
        pad: token that fills a sequence.
        attention_mask: give a causal mask [2, 1, L, L] too, True where attention is forbidden.

    Attributes:
        keys: of each pair, a hash of its tokens and of which of them have a loss.
        reference_N2: log-probabilities of the chosen and the rejected answer by the frozen
            reference; None until they are known.

    Raises:
        ValueError: no pair, or one that can't be trained on: with its origin and why.
    """

    def __init__(self, path: str, sequence_length: int, pad: int, attention_mask: bool) -> None:
        self.path, self.sequence_length, self.pad = path, sequence_length, pad
        self.attention_mask = attention_mask
        self.reference_N2: torch.Tensor | None = None
        if not len(self):
            raise ValueError(f"{path}: no preference pairs in it.")
        self.keys = [self._key(number) for number in range(len(self))]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pair(self, number: int) -> Pair:
        """Both answers after their prompt, whole."""

    @abstractmethod
    def origin(self, number: int) -> str:
        """Where a pair is from, as sentences name it."""

    @abstractmethod
    def identity(self, number: int) -> Identity:
        """Who the pair is."""

    def _key(self, number: int) -> bytes:
        chosen, rejected = pair = self.pair(number)
        where = self.origin(number)
        for name, part in zip(("chosen", "rejected"), pair, strict=True):
            if len(part.ids) > self.sequence_length + 1:
                raise ValueError(
                    f"{where}: the {name} answer and its prompt have {len(part.ids)} tokens, more "
                    f"than the {self.sequence_length + 1} of --seq-length {self.sequence_length} "
                    "and a last label: shorten it, leave it out or raise --seq-length."
                )
            if not part.mask.any():
                raise ValueError(f"{where}: the {name} answer has no token to train on.")
        if np.array_equal(chosen.ids, rejected.ids):
            raise ValueError(f"{where}: the chosen and the rejected answer are the same.")
        return Sample(pair).content(masks=True)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """tokens, labels, answer_mask, position_ids, each [2, L], the chosen answer first.

        answer_mask is 1 where the label belongs to the answer; loss_mask [1] is what the pair
        counts in the loss, all of its tokens; reference_log_prob [2] is there once it is known.
        """
        sides = [padded(part, self.sequence_length, self.pad) for part in self.pair(number)]
        sample = {name: torch.stack([side[name] for side in sides]) for name in sides[0]}
        sample["answer_mask"] = sample.pop("loss_mask")
        sample["loss_mask"] = torch.tensor([float(sample["tokens"].numel())])
        if self.attention_mask:
            mask = causal_mask(self.sequence_length)
            sample["attention_mask"] = torch.stack([mask, mask])
        if self.reference_N2 is not None:
            sample["reference_log_prob"] = self.reference_N2[number]
        return sample


class FilePairs(Pairs):
    """The pairs of a file or folder, tokenised once and kept in memory.

    A record has `chosen` and `rejected`, with or without `prompt`: texts, each followed by the
    end-of-document token, or lists of messages. The answers alone have a loss.

    Args:
        chat: for messages; None if the tokenizer has no chat template.

    Raises:
        ValueError: as `Pairs`, or a missing file, or a wrong record.
    """

    def __init__(
        self, path: str, tokenizer: Tokenizer, sequence_length: int, chat: Chat | None = None,
        attention_mask: bool = False,
    ) -> None:  # fmt: skip
        self._pairs, self._identities = list[tuple[str, Pair]](), Identities()
        encoder = Encoder("preference", tokenizer, dict(zip(COLUMNS, COLUMNS, strict=True)), chat)
        for where, record in read(path):
            with records.at(where):
                chosen, rejected = encoder(record).parts
            self._pairs.append((where, (chosen, rejected)))
            self._identities.add(where, record)
        super().__init__(path, sequence_length, tokenizer.eod, attention_mask)

    def __len__(self) -> int:
        return len(self._pairs)

    def pair(self, number: int) -> Pair:
        return self._pairs[number][1]

    def origin(self, number: int) -> str:
        return self._pairs[number][0]

    def identity(self, number: int) -> Identity:
        return self._identities[number]
