"""What the plugin's own work in a step takes: bytes sent, and milliseconds of each part.

One step is under way at a time, so what works for it (`part`, `sent`) finds its meter by itself.
The host never waits for the device: on a GPU times are read one step late, from events that have
passed by then.
"""

import itertools
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_dr.mcore.progress import here

_running: list["Meter"] = []


class Meter:
    """Of one handle.

    Attributes:
        bytes: what this rank sent in the step under way, beside Megatron's own reduction.
        milliseconds: of each part.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self.milliseconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._part = ""
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []  # a part, and its end

    @contextmanager
    def running(self) -> Iterator[None]:
        """A step is under way inside."""
        if self._cuda:
            self._read()
        self._marks, self._part, self.bytes = [("", self._now())], "", 0
        _running.append(self)
        try:
            yield
        finally:
            _running.pop()
            if not self._cuda:
                self._read()

    def mark(self, part: str) -> str:
        """Another part begins; the one before."""
        self._marks.append((self._part, self._now()))
        before, self._part = self._part, part
        return before

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        """Take over the marks, unless the device has not reached the last of them."""
        last = self._marks[-1][1] if self._marks else 0.0
        if not isinstance(last, float) and not last.query():
            return
        found: dict[str, float] = {}
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            if isinstance(before, float) or isinstance(after, float):
                span = (after - before) * 1e3  # type: ignore[operator]
            else:
                span = before.elapsed_time(after)
            found[part] = found.get(part, 0.0) + span
        found.pop("", None)  # the host's own work
        self.milliseconds = found or self.milliseconds


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done inside is this part of the step: sketch, exchange, solve or combine. Parts may
    lie in one another, and the inner one's time is not the outer's."""
    outer = _running[-1].mark(name) if _running else ""
    before, here.part = here.part, name
    try:
        yield
    finally:
        here.part = before
        if _running:
            _running[-1].mark(outer)


def sent(num_bytes: int) -> None:
    """So many bytes were sent."""
    if _running:
        _running[-1].bytes += num_bytes


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has had so far: tensors of a GPU, or else main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
