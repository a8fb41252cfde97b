"""Chat templates that are damaged, or made of pieces that don't go together."""

from typing import Any

from hypothesis import strategies as st

from megatron_dr.data import rendering
from megatron_dr.data.chat import Chat
from tests.data import _chat
from tests.data.test_rendering import ENDLESS

from ._cases import bounded, damaged, fuzzed

_TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
_PIECES = st.lists(st.sampled_from([
    "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m.role }}", "{{ messages }}",
    "{% generation %}", "{% endgeneration %}", "{{ '<|im_end|>' }}", "{{ messages[9].content }}",
    "{% if add_generation_prompt %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}",
    "{{ m | tojson }}", "{{ messages[0].content * 99999999 }}", "{{ 9 ** 99999999 }}",
    "{% break %}",
    "{{ strftime_now('%Y') }}", "{{ '\\ud800' }}", "{{ [].append(1) }}", "{% macro f() %}",
    "{% endmacro %}", "{{ f() }}", "{{ ''.join }}", "{% set ns = namespace(x=1) %}", "{{ ns.x }}",
    "{% include 'a' %}", "{% import 'os' as o %}", "{{ self }}", "{{ range(99999) | list }}", "\n ",
]), max_size=8).map("".join)  # fmt: skip
_DAMAGED = damaged([_chat.CHATML.encode(), _chat.MARKED.encode()]).map(
    lambda text: text.decode("utf-8", "replace") or " "
)


def encode(case: str) -> None:
    """Tokens with a loss, or one sentence; and the next conversation is rendered as ever."""
    before, rendering.SECONDS = rendering.SECONDS, 2
    try:
        chat = Chat(_tokenizer(case))
        with bounded():
            assert chat.encode(_TALK).mask.any()
    except ValueError as error:
        assert str(error).strip()
    finally:
        rendering.SECONDS = before


def _tokenizer(template: str) -> Any:
    return _chat.fast(template or " ")


FAILED = [
    ENDLESS, "{{ ('a' * 10 ** 12) | length }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% generation %}{{ messages }}{% generation %}a{% endgeneration %}{% endgeneration %}",
]  # fmt: skip
test_encode, test_encode_long = fuzzed(encode, _PIECES | _DAMAGED, 15, 600, FAILED)
