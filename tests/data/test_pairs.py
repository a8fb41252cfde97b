"""What a preference record becomes: two sequences with a loss on the answers; wrong ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.data.chat import Chat
from megatron_dr.data.pairs import FilePairs

from . import _chat
from ._tokenizer import ByteTokenizer

LENGTH = 24
GOOD = {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five, or so"}


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def write(folder: Path, *records: Any) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def answers(sample: dict[str, torch.Tensor], decode: Any) -> list[str]:
    """The labels that have a loss, decoded, of chosen and rejected."""
    return [
        decode(labels[mask == 1].tolist())
        for labels, mask in zip(sample["labels"], sample["answer_mask"], strict=True)
    ]


def test_the_answers_alone_have_a_loss(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    alone = {"chosen": "yes", "rejected": "no"}
    first, second = FilePairs(write(tmp_path, GOOD, alone), tokenizer, LENGTH)
    assert answers(first, tokenizer.decode) == ["Four.<|end|>", "Five, or so<|end|>"]
    for tokens in first["tokens"]:
        assert tokenizer.decode(tokens.tolist()).startswith(GOOD["prompt"])
    assert {n: list(v.shape) for n, v in first.items()} == {
        **dict.fromkeys(("tokens", "labels", "answer_mask", "position_ids"), [2, LENGTH]),
        "loss_mask": [1],
    }  # fmt: skip
    assert first["loss_mask"].tolist() == [2.0 * LENGTH]  # what experts are counted by
    assert answers(second, tokenizer.decode) == ["es<|end|>", "o<|end|>"]  # nothing is before them


def test_messages_take_the_chat_template(tmp_path: Path) -> None:
    tokenizer = _chat.fast(_chat.CHATML)
    prompt = [{"role": "user", "content": "Hello there"}]
    record = {"prompt": prompt, "chosen": [{"role": "assistant", "content": "I am well."}],
              "rejected": [{"role": "assistant", "content": "Hello"}]}  # fmt: skip
    ours = ByteTokenizer()
    pairs = FilePairs(write(tmp_path, record), ours, 64, Chat(tokenizer), attention_mask=True)
    assert answers(pairs[0], tokenizer.decode) == ["I am well.<|im_end|>", "Hello<|im_end|>"]
    assert list(pairs[0]["attention_mask"].shape) == [2, 1, 64, 64]
    with pytest.raises(ValueError, match="pairs.jsonl:1: messages need a tokenizer with a chat"):
        FilePairs(pairs.path, ours, 64)


def test_keys_tell_pairs_apart(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    """By tokens, by sides, and by where the answer begins."""
    swapped = {**GOOD, "chosen": GOOD["rejected"], "rejected": GOOD["chosen"]}
    moved = {"prompt": GOOD["prompt"][:-1], **{n: " " + GOOD[n] for n in ("chosen", "rejected")}}
    pairs = FilePairs(write(tmp_path, GOOD, swapped, moved, GOOD), tokenizer, LENGTH)
    assert len(set(pairs.keys[:3])) == 3 and pairs.keys[3] == pairs.keys[0]
    assert pairs[0]["tokens"].equal(pairs[2]["tokens"])


WRONG = {
    "column": ({"prompt": "a", "chosen": "b"}, "'rejected' must be a string, and is absent."),
    "sft": ({"text": "a"}, "'chosen' must be a string, and is absent."),
    "equal": ({**GOOD, "rejected": GOOD["chosen"]}, "the chosen and the rejected answer are the"),
    "empty": ({**GOOD, "chosen": " "}, "'chosen' is empty."),
    "long": (
        {**GOOD, "rejected": "x" * 12},
        "the rejected answer and its prompt have 26 tokens, more than the 25 of --seq-length 24 ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("record, sentence", WRONG.values(), ids=WRONG.keys())
def test_wrong_records_are_named(
    tmp_path: Path, tokenizer: ByteTokenizer, record: Any, sentence: str
) -> None:
    path = write(tmp_path, GOOD, record)
    with pytest.raises(ValueError) as error:
        FilePairs(path, tokenizer, LENGTH)
    assert str(error.value).startswith(f"{path}:2: {sentence}")


def test_an_empty_file_is_refused(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    with pytest.raises(ValueError, match="pairs.jsonl: no preference pairs in it."):
        FilePairs(write(tmp_path), tokenizer, LENGTH)


def test_a_pair_may_fill_the_sequence(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    full = {**GOOD, "rejected": "x" * 11}
    (sample,) = FilePairs(write(tmp_path, full), tokenizer, LENGTH)
    assert sample["labels"][1, -1] == tokenizer.eod and sample["answer_mask"][1, -1] == 1
