"""Prompts from JSONL, and the sentence for each wrong line."""

import json
from pathlib import Path

import pytest

from megatron_dr.data.chat import Chat
from megatron_dr.rl.prompts import read_asked, read_prompts

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


def test_samples_are_questions(tmp_path: Path) -> None:
    """A reward's answer is the record's own, or the reference."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "1+1", "response": "so 2", "answer": 2}\n{"prompt": "b", "response": "c"}\n'
    )
    found = read_asked(str(path), Letters(), 8)
    assert [(one.prompt.content, one.reference) for one in found] == [("1+1", "so 2"), ("b", "c")]
    assert [one.prompt.answer for one in found] == [2, "c"]
    assert found[0].prompt.tokens == (1, *b"1+1") and found[1].prompt.origin == f"{path}:2"
    assert found[0].end is None


@pytest.mark.parametrize("template", [_chat.CHATML, _chat.MARKED])
def test_the_last_turn_is_the_reference(tmp_path: Path, template: str) -> None:
    """The answer ends where the template ends a turn, whatever the tokenizer ends a text with."""
    path = tmp_path / "a.jsonl"
    turns = [("user", "Hi"), ("assistant", "Well?"), ("user", "Go on"), ("assistant", "Yes.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path.write_text(json.dumps({"messages": messages}))
    tokenizer = _chat.fast(template)
    tokenizer.eos_token = "</s>"
    (found,) = read_asked(str(path), Letters(), 200, Chat(tokenizer))
    assert found.reference == found.prompt.answer == "Yes."
    assert found.prompt.content == messages[:3]
    assert found.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.decode(found.prompt.tokens).endswith(
        "Go on<|im_end|>\n<|im_start|>assistant\n"
    )


NO_QUESTION = {
    '{"text": "a"}': "a.jsonl:1: a sample whose answer is generated must have 'prompt' with "
    "'response', or 'messages'; this one has 'text'.",
    '{"prompt": "a", "answer": "b"}': "a.jsonl:1: a sample whose answer is generated must have",
    '{"prompt": "a", "response": " "}': "a.jsonl:1: the answer to compare with has no text.",
    '{"prompt": "a", "response": 2}': "a.jsonl:1: the answer to compare with has no text.",
    '{"prompt": "", "response": "b"}': "a.jsonl:1: 'prompt' is empty.",
    '{"prompt": "abcdefg", "response": "b"}': "a.jsonl:1: the prompt has 8 tokens and leaves no",
    '{"messages": [{"role": "user", "content": "a"}]}': "a.jsonl:1: 'messages' must end with",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "a.jsonl:1: 'messages' must end with",
    "": "a.jsonl: the file has no samples.",
}


@pytest.mark.parametrize("text, sentence", NO_QUESTION.items())
def test_what_is_no_question_is_named(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_asked(str(path), Letters(), 8)
    assert str(error.value).startswith(f"{tmp_path}/{sentence}")
