r"""Rewards that ship: functions (prompt, completion, answer) -> float, named `module:function`.

The completion is text. Prompt and answer are what the data file holds: the prompt is text or
messages. A wrong completion gets 0; a useless answer (not a number, not a pattern) raises, since no
completion could be right.
"""

import logging
import math
import re
from collections.abc import Callable
from typing import Any

from megatron_dr.rl import sandbox

Reward = Callable[[Any, str, Any], float]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_TOLERANCE = 1e-6
_VAST = 1e6  # natural logarithm


def exact_match(prompt: Any, completion: str, answer: Any) -> float:
    """1 if completion and answer are the same text, blanks around them aside."""
    return float(completion.strip() == str(answer).strip())


def numeric(prompt: Any, completion: str, answer: Any) -> float:
    """1 if the completion's last number is the answer, to 1e-6 of it.

    Raises:
        ValueError: the answer is not a finite number.
    """
    expected = float(str(answer).replace(",", ""))
    if not math.isfinite(expected):  # any number would be as near as 1e-6 of it
        raise ValueError(f"the answer {str(answer)[:100]!r} is no finite number.")
    numbers = _NUMBER.findall(completion)
    if not numbers:
        return 0.0
    found = float(numbers[-1].replace(",", ""))
    return float(abs(found - expected) <= _TOLERANCE * max(1.0, abs(expected)))


def regex(prompt: Any, completion: str, answer: Any) -> float:
    """1 if the regular expression `answer` is found in the completion.

    Raises:
        re.error: the answer is not a regular expression.
    """
    return float(re.search(str(answer), completion) is not None)


def boxed(prompt: Any, completion: str, answer: Any) -> float:
    r"""1 if the completion's last `\boxed{...}` is the answer's mathematics (by math-verify).

    The answer is a formula, with or without `\boxed{}`. A completion without a box gets 0.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: math-verify can't read the answer.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("the reward `boxed` needs: pip install math-verify") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that timeouts are off
    found = last_boxed(completion)
    wanted = last_boxed(str(answer)) or str(answer)
    # timeouts by signal are off: the pool that runs rewards has its own
    expected = parse(f"\\boxed{{{wanted}}}", parsing_timeout=None)
    if not expected:
        raise ValueError(f"math-verify can't read the answer {answer!r}.")
    if found is None:
        return 0.0
    given = parse(f"\\boxed{{{found}}}", parsing_timeout=None)
    if any(map(_is_vast, given)) and not any(map(_is_vast, expected)):
        return 0.0
    return float(verify(expected, given, timeout_seconds=None))


def _is_vast(formula: Any) -> bool:
    """Whether a power in it has more than some 400,000 digits: its value could take hours."""
    import sympy

    if not isinstance(formula, sympy.Basic):
        return False
    for part in sympy.postorder_traversal(formula):  # an exponent is looked at before its power
        if not isinstance(part, sympy.Pow) or not part.is_number:
            continue
        base, power = (abs(sympy.N(one)) for one in part.args)
        if base.is_positive and power.is_finite and bool(abs(power * sympy.log(base)) > _VAST):
            return True
    return False


def last_boxed(text: str) -> str | None:
    r"""What stands in the last complete `\boxed{...}`, nested braces included. In one pass: a
    completion may be all braces."""
    boxes = {match.end() for match in re.finditer(r"\\boxed\s*\{", text)}
    opened, last = list[int](), (-1, -1)
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in boxes:
            last = max(last, (start, brace.start()))
    return None if last[0] < 0 else text[slice(*last)]


def unit_tests(prompt: Any, completion: str, answer: Any) -> float:
    """1 if the completion's Python passes the answer's asserts in a sandbox (see `sandbox`).

    It can change none of the user's files. A machine that can't give that is refused at the start,
    unless --dr-rl-unsafe-sandbox is given.

    The code is the completion's last fenced block, or all of it where there is none.

    Args:
        answer: Python text, or a list of such lines.

    Raises:
        Impossible: the machine can't keep the code apart.
    """
    blocks = _FENCED.findall(completion)
    tests = "\n".join(answer) if isinstance(answer, list) else str(answer)
    return float(sandbox.passes(blocks[-1] if blocks else completion, tests))


unit_tests.at_start = sandbox.check  # type: ignore[attr-defined]  # a pool's workers call it first
