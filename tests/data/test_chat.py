"""A loss on the assistant's words and the end of its turn, and on nothing else: by decoding."""

import numpy as np
import pytest
from transformers import ByT5Tokenizer

from megatron_dr.data.chat import Chat
from megatron_dr.data.sample import Part

from . import _chat

ENDS = {_chat.CHATML: "<|im_end|>", _chat.MARKED: "<|im_end|>", _chat.INSTRUCT: "</s>"}
ANSWERS = ["I am well.", "Zürich → 東京 🙂", " spaces, kept ", "two\n\nlines\n", "<|odd|>", "x"]


def conversation(*answers: str) -> list[dict[str, str]]:
    turns = []
    for n, answer in enumerate(answers):
        turns += [
            {"role": "user", "content": f"Question {n}?\n"},
            {"role": "assistant", "content": answer},
        ]
    return turns


def trained(part: Part, chat: Chat) -> list[str]:
    """The runs of tokens that have a loss, each decoded."""
    edges = np.flatnonzero(np.diff(part.mask, prepend=0, append=0))
    return [chat.tokenizer.decode(part.ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", ENDS)
def test_answers_and_their_ends_have_a_loss(template: str) -> None:
    chat = Chat(_chat.fast(template))
    before = " " if template == _chat.INSTRUCT else ""
    messages = conversation(*ANSWERS)
    part = chat.encode(messages)
    assert trained(part, chat) == [before + answer + ENDS[template] for answer in ANSWERS]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert chat.tokenizer.decode(part.ids) == text


def test_several_roles() -> None:
    chat = Chat(_chat.fast(_chat.CHATML))
    messages = [{"role": "system", "content": "Be brief."}, *conversation("Yes.")]
    messages += [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "No."}]
    assert trained(chat.encode(messages), chat) == ["Yes.<|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize("answer", ["\n\nBelow.", "\nBelow."])
def test_an_answer_that_begins_as_its_prompt_ends(answer: str) -> None:
    """The BPE joins both line ends in one token; a model that generates sees the prompt's alone."""
    chat = Chat(_chat.fast(_chat.CHATML))
    assert len(chat.tokenizer("\n\n").input_ids) == 1
    messages = conversation("One.", answer)
    part = chat.encode(messages)
    assert trained(part, chat) == ["One.<|im_end|>", answer + "<|im_end|>"]
    prompt = chat.prompt(messages[:-1])
    assert part.ids[: len(prompt)].tolist() == prompt.tolist()


@pytest.mark.parametrize("template", ENDS)
def test_given_messages_have_no_loss(template: str) -> None:
    chat = Chat(_chat.fast(template))
    messages = conversation("One.", "Two.", "Three.")
    whole, part = chat.encode(messages), chat.encode(messages, given=4)
    assert trained(part, chat) == trained(whole, chat)[2:]
    assert part.ids.tolist() == whole.ids.tolist()


def test_a_template_that_renders_a_turn_in_two_ways() -> None:
    chat = Chat(_chat.fast(_chat.FORGETFUL))
    with pytest.raises(ValueError, match="up to number 2 differently"):
        chat.encode(conversation("One.", "Two."))


@pytest.mark.parametrize(
    "messages, sentence",
    [
        ([{"role": "user", "content": "Hello"}], "no message of the assistant"),
        ([{"role": "user"}, {"role": "assistant", "content": "x"}], "refuses the messages"),
    ],
)
def test_wrong_messages(messages: list[dict[str, str]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Chat(_chat.fast(_chat.CHATML)).encode(messages)


def test_a_conversation_that_begins_with_the_assistant() -> None:
    """Also where the template looks at the first message, and puts a message of its own before."""
    system = "'<|im_start|>system\\nBe.<|im_end|>\\n'"
    own = "{% if messages[0].role != 'system' %}{{ " + system + " }}{% endif %}"
    answers = {_chat.CHATML: "Hi.<|im_end|>", own + _chat.CHATML: "Hi.<|im_end|>",
               _chat.MARKED: "Hi.<|im_end|>", _chat.INSTRUCT: "Hi.</s>"}  # fmt: skip
    for template, first in answers.items():
        chat = Chat(_chat.fast(template))
        messages = [{"role": "assistant", "content": "Hi."}, *conversation("One.")]
        second = (" " if template == _chat.INSTRUCT else "") + first.replace("Hi", "One")
        assert trained(chat.encode(messages), chat) == [first, second], template
        assert trained(chat.encode(messages, given=1), chat) == [second], template


CODE = "if x:\n        return  four\n\n    \n"


@pytest.mark.parametrize("template", ENDS)
def test_white_space_has_a_loss_where_places_are_trimmed(template: str) -> None:
    chat, plain = Chat(_chat.trimming(template)), Chat(_chat.fast(template))
    messages = conversation(CODE, "   " + CODE)
    part = chat.encode(messages)
    before = " " if template == _chat.INSTRUCT else ""
    answers = [before + CODE + ENDS[template], before + "   " + CODE + ENDS[template]]
    assert trained(part, chat) == answers
    assert part.ids.tolist() == plain.encode(messages).ids.tolist()
    assert part.ids.tolist() == chat.tokenizer.apply_chat_template(messages)["input_ids"]


@pytest.mark.parametrize("template", [_chat.INSTRUCT, _chat.MARKED])
def test_a_tokenizer_that_tells_no_places(template: str) -> None:
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    chat = Chat(tokenizer)
    part = chat.encode(conversation("One.", CODE.strip()))
    before = " " if template == _chat.INSTRUCT else ""
    answers = [before + answer + ENDS[template] for answer in ("One.", CODE.strip())]
    assert trained(part, chat) == answers


def test_two_named_templates() -> None:
    """What transformers takes: the one for tools, where there are tools."""
    tokenizer = _chat.fast(None)
    with_tools = "{% for t in tools %}{{ t.name }}{% endfor %}" + _chat.CHATML
    tokenizer.chat_template = {"default": _chat.MARKED, "tool_use": with_tools}
    chat, messages = Chat(tokenizer), conversation("One.")
    plain = chat.encode(messages)
    assert plain.ids.tolist() == Chat(_chat.fast(_chat.MARKED)).encode(messages).ids.tolist()
    part = chat.encode(messages, [{"name": "clock"}])
    assert chat.tokenizer.decode(part.ids).startswith("clock<|im_start|>")
    assert trained(part, chat) == trained(plain, chat) == ["One.<|im_end|>"]
    tokenizer.chat_template = {"tool_use": with_tools}
    with pytest.raises(ValueError, match="no default"):
        chat.encode(messages)


def test_no_template() -> None:
    with pytest.raises(ValueError, match="--chat-template"):
        Chat(_chat.fast(None))


@pytest.mark.parametrize("reach", [
    "''.__class__.__mro__[1].__subclasses__()", "messages.append(1)",
    "cycler.__init__.__globals__.os.getpid()",
])  # fmt: skip
def test_a_template_does_not_reach_python(reach: str) -> None:
    with pytest.raises(ValueError, match="unsafe|safely"):
        Chat(_chat.fast("{{ " + reach + " }}")).encode(conversation("Yes."))
