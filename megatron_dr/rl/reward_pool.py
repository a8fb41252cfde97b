"""Evaluates a reward function in worker processes that may raise, hang or crash.

Workers are processes of their own, not forks: a fork of a process that runs CUDA or Megatron's
threads may hang. Samples go there and rewards come back as JSON lines.
"""

import logging
import queue
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from megatron_dr.rl.reward_process import RewardFailure, RewardProcess
from megatron_dr.rl.sandbox import UNSAFE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What a reward function sees; the answer must be JSON. `origin`, for messages: where the
    prompt is from."""

    prompt: Any
    completion: str
    answer: Any
    origin: str = ""

    def named(self, number: int) -> str:
        """In a message, as one of a batch."""
        return self.origin or f"sample {number}"


@dataclass(frozen=True)
class Scores:
    """Rewards in the samples' order, and how many samples failed, by kind.

    Attributes:
        rewards: None where the function failed.
        failures: of the kinds `raised`, `timeout`, `crashed` and `invalid` (no finite number that
            float32 holds).
    """

    rewards: list[float | None]
    failures: Counter[str]


class RewardPool:
    """Scores batches with one reward function, until `close`.

    A sample whose evaluation raises, takes longer than `timeout`, ends the process, or gives
    anything but a finite number costs that sample alone: it is logged and counted, and a
    worker that hung or crashed is replaced.

    Args:
        name: `module:function`, imported in the workers.
        workers: processes.
        timeout: seconds for a sample.
        unsafe_sandbox: let models' code run where it can't be kept apart; see `sandbox`.

    A function may have an attribute `at_start`, called before the first sample: what it raises is
    told at the start.

    Raises:
        ValueError: the name can't be loaded or used here, or an argument is not above 0.
    """

    def __init__(
        self, name: str, workers: int, timeout: float, unsafe_sandbox: bool = False
    ) -> None:
        if workers < 1 or not timeout > 0:
            raise ValueError(
                f"a reward pool needs workers ({workers}) and a timeout ({timeout}) above 0."
            )
        self.name, self._timeout = name, timeout
        environment = {UNSAFE: "1"} if unsafe_sandbox else {}
        self._processes = [RewardProcess(name, environment) for _ in range(workers)]
        self._idle: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")
        try:
            self._processes[0].start()  # tells a wrong name now, not in the middle of a run
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            self._idle.put(process)

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Rewards of a batch.

        Raises:
            ValueError: a worker can't load the function any more, or run models' code apart.
            TypeError: an answer is not JSON.
        """
        results = list(self._threads.map(self._score, range(len(samples)), samples))
        failures = Counter(r.kind for r in results if isinstance(r, RewardFailure))
        if failures:
            counts = ", ".join(f"{count} {kind}" for kind, count in sorted(failures.items()))
            _log.warning("reward %s failed on %s of %d samples", self.name, counts, len(samples))
        rewards = [None if isinstance(r, RewardFailure) else r for r in results]
        return Scores(rewards, failures)

    def _score(self, number: int, sample: Sample) -> float | RewardFailure:
        process = self._idle.get()
        try:
            result = process.evaluate(
                (sample.prompt, sample.completion, sample.answer), self._timeout
            )
        finally:
            self._idle.put(process)
        if isinstance(result, RewardFailure):
            _log.warning("reward %s, %s: %s", self.name, sample.named(number), result.message)
        return result

    def close(self) -> None:
        """End the workers."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.stop()
