"""Process of a `Renderer`: `python -m megatron_dr.data.render_worker`.

It reads requests and answers each. A request is 8 bytes of length and a pickle, which its parent
made. An answer is 8 bytes of length, a line of JSON and the rendered text, so that its parent need
not trust a process in which a stranger's template ran:

    {"spans": [[start, end], ...], "marked": bool} and the text, or {"error": sentence}, or
    {"memory": true}
"""

import importlib.util
import json
import math
import os
import pickle
import resource
import signal
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import psutil

from megatron_dr.data.turns import Span, Template


def main() -> None:
    asked, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jinja = renderer()
    start = psutil.Process().memory_info().vms
    while head := asked.read(8):
        memory, seconds, request = pickle.loads(asked.read(int.from_bytes(head)))
        _limit(resource.RLIMIT_AS, start + memory)
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + seconds))
        try:
            answer = _answer(jinja, **request)
        except MemoryError:
            answer = b'{"memory": true}\n'
        replies.write(len(answer).to_bytes(8) + answer)
        replies.flush()


def _limit(kind: int, value: int) -> None:
    """Only the soft one, which the next request's may be above."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))


def renderer() -> Callable[..., Any]:
    """transformers' `render_jinja_template`; of transformers nothing else is imported, which would
    take seconds."""
    names = ("transformers", "transformers.utils")
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        for name in names:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            empty = types.ModuleType(name)
            empty.__path__, empty.__spec__ = list(spec.submodule_search_locations or ()), spec
            sys.modules[name] = empty
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception:  # a version whose parts are not so apart
        for name in [n for n in sys.modules if n.split(".")[0] == names[0]]:
            del sys.modules[name]
        from transformers.utils.chat_template_utils import render_jinja_template
    return render_jinja_template


def _answer(
    jinja: Callable[..., Any], kind: str, template: str, special: dict[str, Any], whose: str,
    most: int, **more: Any,
) -> bytes:  # fmt: skip
    """Of one request: `kind` is one of `turns`, `prompt` and `plain`."""
    held = Template(template, special, whose, jinja)
    try:
        text, spans = _made(held, kind, **more)
        if len(text) > most:
            raise ValueError(f"{whose} makes {len(text)} characters of the messages, which is no "
                             f"conversation: {most} are the most.")  # fmt: skip
        written = text.encode()
    except UnicodeEncodeError:
        error = f"{whose} writes half of a surrogate pair."
    except ValueError as refusal:
        error = str(refusal)
    except RecursionError:
        error = f"{whose} is nested too deeply, or the messages are."
    else:
        found = {"spans": spans, "marked": held.marked}
        return json.dumps(found).encode() + b"\n" + written
    return json.dumps({"error": error}).encode() + b"\n"


def _made(
    template: Template, kind: str, messages: list[Any], tools: Any, given: int = 0
) -> tuple[str, list[Span]]:
    if kind == "turns":
        return template.turns(messages, tools, given)
    if kind == "prompt":
        template.checked(messages, tools)
    return template.render(messages, tools, prompt=kind == "prompt"), []


if __name__ == "__main__":
    main()
