"""Process of a `RewardPool`: `python -m megatron_dr.rl.reward_worker module:function`.

It reads lines of JSON, each with a word that no other has: [word] alone to load the function, then
[word, prompt, completion, answer] for one sample. It answers each with one line that has the word,
{"word": word, ...}: {"ready": true}, {"reward": r}, or {"error": kind, "message": text}. What the
function writes to any descriptor, or reads from its input, is thus neither a reply nor a sample.
"""

import fcntl
import json
import os
import reprlib
import signal
import sys
import threading
import time
from typing import Any

from megatron_dr.config.named import load_function
from megatron_dr.report import hidden
from megatron_dr.rl.finite import finite
from megatron_dr.rl.rewards import Reward
from megatron_dr.rl.sandbox import Impossible

_TEXT = 500  # of a message


def main() -> None:
    asked, replies = os.fdopen(_away(0), encoding="utf-8"), _away(1)
    os.dup2(2, 1)  # what a reward function prints must not look like a reply
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # nor may it, or a child of it, take a sample
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    reward: Reward | None = None
    for line in asked:
        word, *sample = json.loads(line)
        if reward is None:
            reward, reply = _load(sys.argv[1])
        else:
            reply = _evaluate(reward, *sample)
        # the line before it may be the function's own, without an end
        _write(replies, f"\n{json.dumps({'word': word, **reply})}\n".encode())
        if reward is None:
            return


def _load(name: str) -> tuple[Reward | None, dict[str, Any]]:
    """The function, if it can be used here, and the reply that says so."""
    try:
        reward = load_function("reward", name)
        getattr(reward, "at_start", lambda: None)()
    except (Exception, SystemExit) as error:
        return None, {"error": "load", "message": hidden.error(error, 4 * _TEXT, hidden.SENTENCES)}
    return reward, {"ready": True}


def _evaluate(reward: Reward, prompt: Any, completion: str, answer: Any) -> dict[str, Any]:
    try:
        value: Any = reward(prompt, completion, answer)
        number = finite(value)
        if number is not None:
            return {"reward": number}
        said = reprlib.repr(value)[:_TEXT]  # an int of too many digits has no repr
        return {
            "error": "invalid",
            "message": f"returned {hidden.shown(said)}, not a finite number",
        }
    except Impossible as error:  # of every sample
        return {"error": "load", "message": str(error)}
    except (Exception, SystemExit) as error:
        return {"error": "raised", "message": hidden.error(error)}


def _away(descriptor: int) -> int:
    """A copy of it where no function expects one of its own."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 100)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _die_with(parent: int) -> None:
    """A reward function may hang: end the process group once the run is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
