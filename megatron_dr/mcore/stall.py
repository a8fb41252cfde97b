"""Who is waited for: a thread that says which ranks have not arrived, and who is gone.

Each rank's thread leaves the note of `progress` in the store where torch's ranks met, every tick.
Where its own rank has not moved on in a step for the stated time, it reads the others' notes twice,
some ticks apart: a rank that left none in between gives no sign of life. A sentence is said once,
by the rank that finds it first. The thread ends nothing, and the ranks' own threads do nothing for
it but keep their notes.
"""

import atexit
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from megatron_dr.mcore import collectives, progress
from megatron_dr.mcore.progress import here

_TICK = 1.0  # seconds between two notes, at most
_GONE = "gone"
_PLACES = 8  # ranks in a sentence
_watch: "Watch | None" = None
_times = 0  # that somebody watched in this process: the same on all ranks
Note = dict[str, Any]


class Watch:
    """Of one process.

    Args:
        seconds: that a rank may wait in a step before something is said.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tick = seconds, min(_TICK, seconds / 4)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.store = PrefixStore(f"megatron_dr stall {_times}", _own_connection())
        self._beat, self._said, self._over = 0, -1.0, threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="megatron_dr stall", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        with contextlib.suppress(RuntimeError):  # of the store: who keeps it has left
            self.leave_note()
            while not self._over.wait(self.tick):
                self.leave_note()
                late = here.inside and time.monotonic() - here.moved > self.seconds
                if late and here.moved != self._said:
                    self._said = here.moved
                    self._look()

    def leave_note(self, end: str = "") -> None:
        """For the others.

        Args:
            end: what this rank ends with.
        """
        with self._lock:
            self._beat += 1
            note = {
                "beat": self._beat,
                "said": here.said(),
                "counts": dict(here.counts),
                "end": end,
            }
            self.store.set(str(self.rank), json.dumps(note))

    def notes(self) -> dict[int, Note]:
        """Each rank's last one."""
        with self._lock:
            there = [rank for rank in range(self.world) if self.store.check([str(rank)])]
            return {rank: json.loads(self.store.get(str(rank))) for rank in there}

    def twice(self, apart: float) -> tuple[dict[int, Note], list[int]]:
        """The notes, and who left none in so many seconds."""
        before = self.notes()
        end = time.monotonic() + apart
        while time.monotonic() < end and not self._over.wait(self.tick):
            self.leave_note()
        after = self.notes()
        still = [
            rank for rank in range(self.world)
            if rank not in after or (after[rank]["beat"] == before.get(rank, {}).get("beat")
                                     and not after[rank]["end"])
        ]  # fmt: skip
        return after, still

    def _look(self) -> None:
        """Say who is waited for, unless this rank has moved on."""
        waits, moved, step = here.waits, here.moved, here.step
        notes, silent = self.twice(4 * self.tick)
        if here.moved != moved or here.step != step:
            return
        late: list[int] = []
        of_whom = ""
        if waits is not None:
            name, number = waits
            ranks = progress.ranks_of(name)
            late = [r for r in ranks if notes.get(r, {}).get("counts", {}).get(name, 0) < number]
            of_whom = f", in collective {number} of {collectives.said(ranks)}"
        missing = sorted({*late, *silent} - {self.rank})
        if not missing or self.store.add(f"{step} {missing}", 1) != 1:
            return
        seconds = time.monotonic() - moved
        places = "; ".join(self._of(rank, notes, rank in silent) for rank in missing[:_PLACES])
        _print(
            f"rank {self.rank} has waited {seconds:.0f} s ({here.said()}{of_whom}) for "
            f"{collectives.said(missing)}: {places}"
        )

    def _of(self, rank: int, notes: dict[int, Note], silent: bool) -> str:
        if rank not in notes:
            return f"rank {rank} has left no note yet"
        dead = ", and gives no sign of life" if silent else ""
        where: str = notes[rank]["said"]
        return f"rank {rank} was last {'in ' * where.startswith('step')}{where}{dead}"


def _own_connection() -> Any:
    """To the store where ranks met: a thread that waits for an answer keeps no other waiting."""
    met = inner = dist.distributed_c10d._get_default_store()
    while isinstance(inner, PrefixStore):
        inner = inner.underlying_store
    return met.clone() if isinstance(inner, TCPStore) else met  # a file's would remove the file


def _print(sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(f"megatron_dr: {sentence}", file=sys.stderr, flush=True)


def begin(seconds: float) -> None:
    """Watch from now on; 0: don't. Where somebody watches, the new limit holds."""
    global _watch, _times
    end()
    _times += 1
    if seconds > 0 and dist.get_world_size() > 1:
        _watch = Watch(seconds)
        atexit.register(end)  # before the interpreter takes the thread's ground away


def end() -> None:
    """Nobody watches. Safe to call twice."""
    global _watch
    if _watch is not None:
        watch, _watch = _watch, None
        watch.close()
        atexit.unregister(end)


@contextlib.contextmanager
def told_who_is_gone() -> Iterator[None]:
    """Where a peer's end ends this rank, too, say which one it was, then go on ending."""
    try:
        yield
    except Exception as error:
        if _watch is not None:
            watch = _watch
            with contextlib.suppress(RuntimeError):
                watch.leave_note(f"{type(error).__name__}: {error}"[:200])
            if _is_of_peers(error):
                _tell(watch)
                end()  # it is said once
        raise


def _is_of_peers(error: Exception) -> bool:
    text = str(error)
    words = ("gloo", "Connection closed", "Connection reset", "NCCL")
    return isinstance(error, dist.DistError) or any(word in text for word in words)


def _tell(watch: Watch) -> None:
    """Who that was: whoever finds it out tells the others, so that they need not wait again."""
    try:
        if not watch.store.check([_GONE]):
            found = _who(watch, *watch.twice(4 * watch.tick))
            watch.store.set(_GONE, found)
        found = watch.store.get(_GONE).decode()
    except RuntimeError:
        found = "the rank that keeps the store where all met, rank 0 or the launcher, is gone"
    _print(f"rank {watch.rank} ends, as {found}")


def _who(watch: Watch, notes: dict[int, Note], silent: list[int]) -> str:
    own = [rank for rank, note in notes.items() if note["end"] and not _of_peers(note["end"])]
    if own:
        return "; ".join(f"rank {rank} ended with {notes[rank]['end']}" for rank in own[:_PLACES])
    if silent:
        are = "are" if len(silent) > 1 else "is"
        places = "; ".join(watch._of(rank, notes, False) for rank in silent[:_PLACES])
        return f"{collectives.said(silent)} {are} gone without a word: {places}"
    return "a connection to another rank broke, though all ranks still leave notes"


def _of_peers(text: str) -> bool:
    return _is_of_peers(RuntimeError(text)) or text.startswith("Dist")
