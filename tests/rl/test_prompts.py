"""Prompts from JSONL, and the sentence for each wrong line."""

import json
from pathlib import Path

import pytest

from megatron_dr.data.chat import Chat
from megatron_dr.rl.prompts import read_prompts

from ..data import _chat


class Letters:
    """A token a letter, and one in front of every text."""

    eod = 0

    def tokenize(self, text: str) -> list[int]:
        return [1, *text.encode()]


def test_prompts_are_read_in_order_with_their_places(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "one", "answer": {"x": [1]}}\n\n{"prompt": "two"}\n')
    second.write_text('{"prompt": "zwei", "other": 1, "answer": "2"}\n')
    found = read_prompts([str(first), str(second)], Letters(), 8)
    assert [p.content for p in found] == ["one", "two", "zwei"]
    assert [p.answer for p in found] == [{"x": [1]}, None, "2"]
    assert found[0].tokens == (1, *b"one")
    assert found[1].origin == f"{first}:3"


def test_messages_are_prompts(tmp_path: Path) -> None:
    """Rendered up to where the assistant is to answer; the reward function gets the messages."""
    path, messages = tmp_path / "a.jsonl", [{"role": "user", "content": "Hi"}]
    path.write_text(json.dumps({"prompt": messages, "answer": 1}))
    tokenizer = _chat.fast(_chat.CHATML)
    (found,) = read_prompts([str(path)], Letters(), 80, Chat(tokenizer))
    assert found.content == messages
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(found.tokens) == text


WRONG = {
    "{": "a.jsonl:1: not JSON",
    '{"text": "no"}': "a.jsonl:1: 'prompt' must be a string, and is absent.",
    '{"prompt": 3}': "a.jsonl:1: 'prompt' must be a string",
    '{"prompt": ""}': "a.jsonl:1: 'prompt' is empty.",
    '{"prompt": "\\ud800"}': "a.jsonl:1: 'prompt' has half of a surrogate pair.",
    '{"prompt": "abcdefg"}': "a.jsonl:1: the prompt has 8 tokens and leaves no room",
    '{"prompt": [{"role": "user", "content": "a"}]}': "a.jsonl:1: messages need a tokenizer with",
    "": "a.jsonl: the file has no prompts.",
}


@pytest.mark.parametrize("text, sentence", WRONG.items())
def test_wrong_lines_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_prompts([str(path)], Letters(), 8)
    assert sentence in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file or folder."):
        read_prompts(["nowhere.jsonl"], Letters(), 8)
