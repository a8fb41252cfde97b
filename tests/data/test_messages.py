"""Messages that can't be trained on are refused by file and line; templates that print anything."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.file_samples import FileSamples

from . import _chat
from ._tokenizer import HuggingFace

# prints whatever it gets, and renders no calls
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# leaves out the roles that it does not know
STRICT = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<|{{ m.role }}|>"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# parts, calls and tools
FULL = (
    "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}"
    "{{ p.text }}{% endfor %}{% endif %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
TEXT = {"type": "text", "text": "a"}
ANSWER = {"role": "assistant", "content": "ok"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]}


def said(content: Any, **more: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": content, **more}]


# (messages, or the whole record; template; what the sentence says after the line's number)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "missing": ([USER, {"role": "assistant", "contents": "x"}], PLAIN, "has no 'content'"),
    "null": (said(None), PLAIN, "has no 'content'"),
    "null of the user": ([USER | {"content": None}, ANSWER], PLAIN, "message 1 of 'messages'"),
    "false": (said(False), PLAIN, "must be a string or a list of parts, and is bool"),
    "number": (said(3), PLAIN, "and is int"),
    "dict": (said({"text": "x"}), PLAIN, "and is dict"),
    "empty": (said(""), PLAIN, "is empty"),
    "no parts": (said([]), FULL, "is empty"),
    "empty parts": (said([{"type": "text", "text": " "}]), FULL, "is empty"),
    "part of words": (said(["x"]), FULL, "is no object and has no text"),
    "image": (said([{"type": "image", "url": "x"}]), FULL, "of type 'image' and has no text"),
    "part of null": (said([{"type": "text", "text": None}]), FULL, "has no text"),
    "no message": ([USER, "x"], PLAIN, "message 2 of 'messages' must be an object"),
    "number for a role": ([{"role": 3, "content": "x"}, ANSWER], PLAIN, "must be an object"),
    "misspelt": ([{"role": "usr", "content": "q"}, ANSWER], PLAIN, "has the role 'usr'"),
    "capital": ([USER, {"role": "Assistant", "content": "q"}, ANSWER], PLAIN, "'Assistant'"),
    "not rendered": ([{"role": "system", "content": "i"}, USER, ANSWER], STRICT,
                     "message 1 (system): the chat template does not render it"),
    "calls not rendered": ([USER, CALL], PLAIN, "does not render its 'tool_calls'"),
    "calls beside": (said("x", tool_calls=CALL["tool_calls"]), PLAIN, "its 'tool_calls'"),
    "parts not rendered": (said([TEXT, {"type": "thought", "thought": "b"}]), FULL,
                           "does not render it"),
    "tools not rendered": ({"messages": [USER, ANSWER], "tools": [{"name": "t"}]}, PLAIN,
                           "does not render the tools"),
}  # fmt: skip
HALF = "x\ud83d"
PAIRS = {
    "role": [{"role": HALF, "content": "a"}, ANSWER],
    "content": said(HALF),
    "part": said([{"type": "text", "text": HALF}]),
    "call": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": HALF}}]}],
    "field": [USER, ANSWER | {HALF: 1}],
    "tools": {"messages": [USER, ANSWER], "tools": [{"name": HALF}]},
}
REFUSED |= {f"half of a pair: {k}": (v, FULL, "surrogate pair") for k, v in PAIRS.items()}


@pytest.mark.parametrize("messages, template, sentence", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, messages: Any, template: str, sentence: str) -> None:
    tokenizer = HuggingFace(_chat.fast(template))
    record = messages if isinstance(messages, dict) else {"messages": messages}
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(each) + "\n" for each in ({"messages": [USER, ANSWER]}, record)]
    path.write_text("".join(lines))
    with pytest.raises(ValueError) as error:
        FileSamples(str(path), tokenizer, 100, Chat(tokenizer.hf))
    assert str(error.value).startswith(f"{path}:2: ") and sentence in str(error.value)
    assert "\n" not in str(error.value)
    str(error.value).encode()


OKAY: dict[str, tuple[Any, str, str]] = {
    "empty question": ([USER | {"content": ""}, ANSWER], PLAIN, "ok<|im_end|>"),
    "two answers": ([USER, ANSWER, ANSWER], PLAIN, "ok<|im_end|>ok<|im_end|>"),
    "parts": (said([TEXT, TEXT]), FULL, "aa<|im_end|>"),
    "a call": ([USER, CALL], FULL, "clock<|im_end|>"),
    "a call and null": ([USER, CALL | {"content": None}], FULL, "clock<|im_end|>"),
    "no tools": ({"messages": [USER, ANSWER], "tools": []}, PLAIN, "ok<|im_end|>"),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"name": "t"}]}, FULL, "ok<|im_end|>"),
    "null beside": ([USER, ANSWER | {"tool_calls": None}], PLAIN, "ok<|im_end|>"),
    "a role that is named": ([USER, {"role": "critic", "content": "no"}, ANSWER],
                             PLAIN + "{# 'critic' #}", "ok<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("messages, template, answer", OKAY.values(), ids=OKAY)
def test_taken(messages: Any, template: str, answer: str) -> None:
    tokenizer = HuggingFace(_chat.fast(template))
    names = dict(zip(COLUMNS, COLUMNS, strict=True))
    record = messages if isinstance(messages, dict) else {"messages": messages}
    part = Encoder("sft", tokenizer, names, Chat(tokenizer.hf))(record).parts[0]
    assert tokenizer.decode(part.ids[part.mask == 1].tolist()) == answer


@pytest.mark.parametrize("field", ["answer", "other", HALF])
def test_half_of_a_pair_beside_a_prompt(field: str) -> None:
    tokenizer = HuggingFace(_chat.fast(None))
    encoder = Encoder("prompts", tokenizer, dict(zip(COLUMNS, COLUMNS, strict=True)), None)
    with pytest.raises(ValueError, match="surrogate pair"):
        encoder({"prompt": "x", "answer": "y", field: HALF})
