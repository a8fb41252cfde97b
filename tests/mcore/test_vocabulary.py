"""A run whose tokenizer has ids that the model has no word for."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dr.mcore.data import preparation, vocabulary
from megatron_dr.mcore.rollouts import engine


class Inner:
    def __init__(self, *ids: int) -> None:
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in self.ids}


def of(*ids: int) -> Any:
    """Megatron's wrapper of transformers' tokenizer."""
    return Namespace(_tokenizer=Namespace(tokenizer=Inner(*ids)), vocab_size=len(ids))


def test_ids_beyond_the_model(tmp_path: Path) -> None:
    """Beyond the padded embedding, or beyond what was converted and is exported again."""
    args = Namespace(padded_vocab_size=384, load=str(tmp_path), pretrained_checkpoint=None)
    vocabulary.check(args, of(0, 5, 300))
    vocabulary.check(args, Namespace(vocab_size=384))  # of another library
    for tokenizer in (of(0, 384), Namespace(vocab_size=385)):
        with pytest.raises(ValueError, match="ids up to 384, but the model's embedding 384 rows"):
            vocabulary.check(args, tokenizer)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"vocab_size": 259}')
    vocabulary.check(args, of(0, 258))
    for found in (
        args,
        Namespace(**vars(args) | {"load": None, "pretrained_checkpoint": tmp_path}),
    ):
        with pytest.raises(ValueError, match="vocab_size is 259, so rows of padding would be"):
            vocabulary.check(found, of(0, 259))


def test_ids_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few words may have large ids: files and rollouts go by the largest, not by their number."""
    assert preparation.token_type(of(0, 70_000)) is np.int32
    assert preparation.token_type(of(0, 7)) is np.uint16
    made: list[int] = []
    monkeypatch.setattr(engine, "MegatronRollouts", lambda _, size, *rest: made.append(size) or own)
    own = Namespace(context=9)
    tokenizer = of(0, 2, 7)
    tokenizer.eod, tokenizer.detokenize = 0, None
    assert engine.open_rollouts([], tokenizer, Namespace(seq_length=4), None) is own
    assert made == [8] and own.context == 4
