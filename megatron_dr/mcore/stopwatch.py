"""How long the projection takes, without making the host wait for the device."""

import time

import torch


class Stopwatch:
    """Milliseconds between `start` and `stop`.

    On a GPU they are read one step late, from events that have passed by then.
    """

    def __init__(self, device: torch.device) -> None:
        self.milliseconds = 0.0
        self._began = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
        self._recorded = False

    def start(self) -> None:
        if self._events is None:
            self._began = time.perf_counter()
            return
        first, last = self._events
        if self._recorded and last.query():
            self.milliseconds = first.elapsed_time(last)
        first.record()

    def stop(self) -> None:
        if self._events is None:
            self.milliseconds = (time.perf_counter() - self._began) * 1e3
            return
        self._events[1].record()
        self._recorded = True
