"""Templates from files and of the package: Qwen 3's renders as its own, and marks what is said."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl

from megatron_dr.data.chat import Chat
from megatron_dr.data.chat_template import template_text
from megatron_dr.mcore.data.template import TemplatePart

from . import _chat

OFFICIAL = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]


def ask(words: str) -> dict[str, Any]:
    return {"role": "user", "content": words}


def say(words: str, thoughts: str | None = None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": words} | more
    return message | ({"reasoning_content": thoughts} if thoughts is not None else {})


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "12:00"}
# of each conversation, what has a loss with thoughts of the last question, of all turns and of none
CONVERSATIONS: dict[str, tuple[list[Any], Any, list[list[str]]]] = {
    "plain": ([SYSTEM, ask("A?"), say("B."), ask("C?"), say("D.")], None, [["B.", "D."]] * 3),
    "thoughts": (
        [ask("A?"), say("B.", "why b"), ask("C?"), say("\n D.", "why d\n")], None,
        [["B.", "<think>\nwhy d\n</think>\n\n D."],
         ["<think>\nwhy b\n</think>\n\nB.", "<think>\nwhy d\n</think>\n\n D."], ["B.", " D."]],
    ),
    "thoughts within": (
        [ask("A?"), say("<think>\nwhy b\n</think>\n\nB."), ask("C?"), say("D.")], None,
        [["B.", "D."], ["<think>\nwhy b\n</think>\n\nB.", "D."], ["B.", "D."]],
    ),
    "a tool": (
        [ask("When?"), say("", "look", tool_calls=CALL), TOOL, TOOL, say("Noon.", "so")], TOOLS,
        [['<think>\nlook\n</think>\n\n<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}'
          "\n</tool_call>", "<think>\nso\n</think>\n\nNoon."]] * 2
        + [['<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>',
            "Noon."]],
    ),
    "the assistant first": ([say("Hi."), ask("A?"), say("B.")], None, [["Hi.", "B."]] * 3),
    "the assistant alone": ([say("Hi.", "greet")], None, [
        ["Hi."], ["<think>\ngreet\n</think>\n\nHi."], ["Hi."]
    ]),
}  # fmt: skip


def trained(chat: Chat, messages: list[Any], tools: Any) -> list[str]:
    part = chat.encode(messages, tools)
    edges = np.flatnonzero(np.diff(part.mask, prepend=0, append=0))
    return [chat.tokenizer.decode(part.ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("messages, tools, expected", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_qwen3(messages: list[Any], tools: Any, expected: list[list[str]]) -> None:
    """Qwen's own text unless the thoughts of all turns are kept; what is learnt, per flag."""
    own = _chat.fast(OFFICIAL.read_text(encoding="utf-8"))
    kinds = {None: expected[0], **dict(zip(("last", "all", "none"), expected, strict=True))}
    for thoughts, answers in kinds.items():
        chat = Chat(_chat.fast(template_text("qwen3", thoughts)))
        assert trained(chat, messages, tools) == [answer + "<|im_end|>" for answer in answers]
        for prompt in (False, True):
            texts = [
                t.apply_chat_template(messages, tools=tools, tokenize=False,
                                      add_generation_prompt=prompt)
                for t in (chat.tokenizer, own)
            ]  # fmt: skip
            assert texts[0] == texts[1] or thoughts == "all"
    given = len(messages) - 1
    chat = Chat(_chat.fast(template_text("qwen3", "all")))
    part = chat.encode(messages, tools, given)
    assert chat.tokenizer.decode(part.ids[part.mask == 1]) == expected[1][-1] + "<|im_end|>"


def test_which_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jinja"
    path.write_text(_chat.MARKED)
    assert template_text(str(path)) == template_text(_chat.MARKED) == _chat.MARKED
    for name, thoughts, sentence in (
        (str(tmp_path / "b.jinja"), None, "no such file, and none of this package's"),
        (str(path), "all", "reads no `thoughts`"),
        (None, "all", "give --chat-template qwen3"),
    ):
        with pytest.raises(ValueError, match=sentence):
            template_text(name, thoughts)


def flags(template: str | None, thoughts: str | None, kind: str) -> Namespace:
    return Namespace(chat_template=template, dr_thoughts=thoughts, tokenizer_type=kind)


def test_the_flag_in_training(tmp_path: Path) -> None:
    """Megatron's tokenizer gets the text; without the flag nothing is done."""
    part = TemplatePart()
    assert part.of(flags(None, None, "NullTokenizer")) is None
    args = flags("qwen3", "none", "HuggingFaceTokenizer")
    part.prepare(part.of(args), args)
    assert args.chat_template == template_text("qwen3", "none")
    args = flags(_chat.MARKED, None, "SentencePieceTokenizer")  # as Megatron itself takes it
    part.prepare(part.of(args), args)
    assert args.chat_template == _chat.MARKED
    with pytest.raises(ValueError, match="is for --tokenizer-type HuggingFaceTokenizer"):
        part.prepare(True, flags("qwen3", None, "SentencePieceTokenizer"))
    with pytest.raises(ValueError, match="no such file"):
        part.prepare(True, flags("qwen4", None, "HuggingFaceTokenizer"))
