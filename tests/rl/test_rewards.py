"""The shipped rewards."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dr.config.named import load_function
from megatron_dr.rl import rewards


@pytest.mark.parametrize(
    "name, completion, answer, reward",
    [
        ("exact_match", " yes\n", "yes", 1.0),
        ("exact_match", "yes.", "yes", 0.0),
        ("exact_match", "12", 12, 1.0),
        ("numeric", "3 + 4 = 7", "7", 1.0),
        ("numeric", "It is 1,234.50 dollars.", 1234.5, 1.0),
        ("numeric", "-2e3", "-2,000", 1.0),
        ("numeric", "7, or rather 8", "7", 0.0),
        ("numeric", "no number", "7", 0.0),
        ("regex", "the cat sat", r"\bcat\b", 1.0),
        ("regex", "concatenate", r"\bcat\b", 0.0),
        ("boxed", r"so \boxed{\frac{1}{2}}.", "0.5", 1.0),
        ("boxed", r"\boxed{1+x}", r"\boxed{x + 1}", 1.0),
        ("boxed", r"\boxed{5}, no: \boxed{\frac{1}{3}}", r"5", 0.0),
        ("boxed", r"it is 5", "5", 0.0),
        ("boxed", r"\boxed{5", "5", 0.0),
        ("boxed", r"\boxed{10^{10^{9}}}", "5", 0.0),  # its value would take minutes
        ("boxed", r"\boxed{1 + 9^{9^{9^{9}}}}", "5", 0.0),
        ("boxed", r"\boxed{2^{10}}", "1024", 1.0),
        ("unit_tests", "```python\ndef f(x):\n    return x + 1\n```", "assert f(1) == 2", 1.0),
        ("unit_tests", "def f(x): return x", ["assert f(1) == 1", "assert f(2) == 3"], 0.0),
    ],
)
def test_shipped_rewards(name: str, completion: str, answer: Any, reward: float) -> None:
    if name == "boxed":
        pytest.importorskip("math_verify")
    function = load_function("reward", f"megatron_dr.rl.rewards:{name}")
    assert function("", completion, answer) == reward


def test_useless_answers_raise() -> None:
    with pytest.raises(ValueError):
        rewards.numeric("", "7", "seven")
    for answer in ("nan", "-inf", "1e400", 10**400):
        with pytest.raises(ValueError, match="is no finite number"):
            rewards.numeric("", "7", answer)
    with pytest.raises(rewards.re.error):
        rewards.regex("", "7", "(")


def test_last_box_may_nest_braces() -> None:
    assert rewards.last_boxed(r"\boxed{1} \boxed{\frac{a}{b^{2}}} }") == r"\frac{a}{b^{2}}"


def _slowly(text: str) -> str | None:
    """Obviously correct: of each box the first place where as many braces are closed as opened."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        for end in range(start, len(text)):
            inside = text[start : end + 1]
            if inside.count("}") > inside.count("{"):
                return text[start:end]
    return None


PARTS = st.sampled_from(["\\boxed", "{", "}", " ", "x", "\\boxed{", "\\boxed {", "\n"])


@given(st.lists(PARTS, max_size=24).map("".join))
def test_the_last_box_is_the_last(text: str) -> None:
    assert rewards.last_boxed(text) == _slowly(text)


def test_a_completion_of_boxes_takes_no_time() -> None:
    """The square of its length would be minutes."""
    assert rewards.last_boxed("\\boxed{" * 200_000) is None
    assert rewards.last_boxed("\\boxed{" * 200_000 + "1" + "}" * 200_000) == "1"
