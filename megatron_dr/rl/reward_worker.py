"""Process of a `RewardPool`: `python -m megatron_dr.rl.reward_worker module:function`.

Reads one sample a line, [prompt, completion, answer] as JSON, and answers with one line:
{"reward": r}, or {"error": kind, "message": text}. Its first line is {"ready": true} or an error.
"""

import json
import math
import numbers
import os
import signal
import sys
import threading
import time
from typing import Any

from megatron_dr.config.named import load_function
from megatron_dr.rl.rewards import Reward


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a reward function prints must not look like a reply
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        reward = load_function("reward", sys.argv[1])
    except Exception as error:
        reply({"error": "load", "message": str(error)})
        return
    reply({"ready": True})
    for line in sys.stdin:
        reply(_evaluate(reward, *json.loads(line)))


def _evaluate(reward: Reward, prompt: Any, completion: str, answer: Any) -> dict[str, Any]:
    try:
        value: Any = reward(prompt, completion, answer)
    except (Exception, SystemExit) as error:
        return {"error": "raised", "message": f"{type(error).__name__}: {error}"}
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        return {"error": "invalid", "message": f"returned {value!r}, not a finite number"[:500]}
    return {"reward": float(value)}


def _die_with(parent: int) -> None:
    """A reward function may hang: end the process group once the run is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
