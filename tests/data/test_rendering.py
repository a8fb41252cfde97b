"""Chat templates that never end or fill the memory: stopped, in a sentence that says where."""

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_dr.data import rendering
from megatron_dr.data.chat import Chat
from megatron_dr.data.chat_template import template_text
from megatron_dr.data.file_samples import FileSamples

from . import _chat
from ._tokenizer import HuggingFace

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "MiB of memory on the messages and was stopped"
BAD = {
    "{% for m in messages %}{{ m.content }}{% generation %}{{ m.content * 70000 }}"
    "{% endgeneration %}{% endfor %}": "characters of the messages, which is no conversation",
    "{{ ('a' * 10 ** 12) | length }}": MEMORY,
    "{{ '%999999999999d' | format(1) }}": MEMORY,
    "{% set ns = namespace(x='a' * 999) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}": MEMORY,
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "refuses the messages (maximum recursion",
    "{{ ''.__class__.__mro__ }}": "refuses the messages (access to attribute",
    "{% for m in messages %}{{ m.content + '\\ud800' }}{% endfor %}": "half of a surrogate pair",
    "{% generation %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{% endgeneration %}": "marks lie in one another",
}


@pytest.mark.parametrize("template, why", BAD.items(), ids=range(len(BAD)))
def test_a_template_has_limits(template: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MEMORY", 1 << 28)
    monkeypatch.setattr(rendering, "CHARACTERS", 60000)
    with pytest.raises(ValueError) as caught:
        Chat(_chat.fast(template)).encode(MESSAGES)
    assert why in str(caught.value)
    assert Chat(_chat.fast(_chat.CHATML)).encode(MESSAGES).mask.any()  # the next one is rendered


def test_the_sentence_names_file_line_and_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endless for one line of the data alone."""
    monkeypatch.setattr(rendering, "SECONDS", 1)
    data, template = tmp_path / "data.jsonl", tmp_path / "own.jinja"
    slow = [MESSAGES[0] | {"content": "slow"}, MESSAGES[1]]
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (MESSAGES, slow)))
    text = f"{{% if messages[0].content == 'slow' %}}{ENDLESS}{{% endif %}}{_chat.CHATML}"
    template.write_text(text)
    tokenizer = HuggingFace(_chat.fast(template_text(str(template))))
    with pytest.raises(ValueError) as caught:
        FileSamples(str(data), tokenizer, 100, Chat(tokenizer.hf))
    assert str(caught.value) == (
        f"{data}:2: the chat template of {template} took more than 1 s of a processor on the "
        "messages and was stopped: mend it, or give another with --chat-template."
    )


def test_a_killed_process_is_replaced_and_a_fork_has_its_own() -> None:
    chat = Chat(_chat.fast(_chat.CHATML))
    wanted = chat.encode(MESSAGES).ids.tolist()
    process = rendering._renderer._process
    assert process is not None
    child = os.fork()
    if not child:
        same = chat.encode(MESSAGES).ids.tolist() == wanted
        other = rendering._renderer._process
        os._exit(0 if same and other is not None and other.pid != process.pid else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert chat.encode(MESSAGES).ids.tolist() == wanted
    assert rendering._renderer._process is process
    process.send_signal(signal.SIGKILL)
    with pytest.raises(ValueError, match=r"ended the process that renders it \(signal 9\)"):
        chat.encode(MESSAGES)
    assert chat.encode(MESSAGES).ids.tolist() == wanted
