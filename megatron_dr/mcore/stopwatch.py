"""How long the parts of a projection take, without making the host wait for the device."""

import time

import torch

PARTS = ("sketch", "exchange", "solve", "combine")


class Stopwatch:
    """Milliseconds of each part; on a GPU read one step late, from events that have passed by then.

    `start`, then `lap(part)` at the end of each part, in order.
    """

    def __init__(self, device: torch.device) -> None:
        self.milliseconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        if self._cuda:
            self._read()
        self._marks = [("", self._now())]

    def lap(self, part: str) -> None:
        self._marks.append((part, self._now()))
        if not self._cuda:
            self._read()

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _read(self) -> None:
        """Take over the marks, unless the device has not reached the last of them."""
        if self._cuda and self._marks and not self._marks[-1][1].query():  # type: ignore[union-attr]
            return
        found: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:]):
            if isinstance(before, float) and isinstance(after, float):
                span = (after - before) * 1e3
            else:
                span = before.elapsed_time(after)  # type: ignore[union-attr]
            found[part] = found.get(part, 0.0) + span
        self.milliseconds = found or self.milliseconds
