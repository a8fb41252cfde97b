"""A run that is ended at some moments and resumed, and what must hold of it."""

import contextlib
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import compare
from .launcher import SURVIVORS, Ended, launch
from .recipes import INTERVAL, RECIPES, STEPS, Recipe, flags
from .traps import ENDS, FILLER, KINDS, Counts, Trap

_ENDS = dict(zip(ENDS, (9, 5, 2, 2, 3), strict=True))  # how often
_MOMENTS = dict(zip(KINDS, (2, 3, 3, 6, 1), strict=True))
_DISK = "48m"


class Alone(NamedTuple):
    """A run that was left alone: all that it kept and logged, and its moments."""

    kept: dict[str, Any]
    logged: dict[tuple[str, int], dict[str, Any]]
    record: Any
    counts: Counts


class Soak:
    """Runs in one folder.

    Args:
        folder: with the data of `recipes.write_data`.
        stopped: seconds that a stopped rank stands still.
    """

    def __init__(self, folder: Path, stopped: float = 20.0) -> None:
        self.folder, self.run, self._stopped = folder, folder / "run", stopped
        self._alone: dict[str, Alone] = {}

    def alone(self, name: str) -> Alone:
        if name not in self._alone:
            with self._fresh(on_disk=False):
                ended = self.launch(RECIPES[name])
                assert not any(ended.codes) and not ended.left, (ended.left, *_tails(ended))
                self._alone[name] = Alone(*self._found(), ended.counts)
        return self._alone[name]

    def cycle(self, name: str, traps: list[Trap], own_writer: bool = False) -> list[Ended]:
        """End a run by each of the traps, one resume after another, and let the last one end.

        Raises:
            AssertionError: the run is not what it is when it is left alone, or how it ended.
        """
        alone, recipe = self.alone(name), RECIPES[name]
        every = []
        with self._fresh(on_disk=any(trap.end == "full disk" for trap in traps)):
            for trap in traps:
                before = compare.tracked(self.run / "saved")
                every.append(self.launch(recipe, trap, own_writer))
                (self.run / FILLER).unlink(missing_ok=True)
                self._check_end(every[-1], trap, before, "--async-save" in recipe.more)
            is_complete = compare.tracked(self.run / "saved") == STEPS
            ended = self.launch(recipe)
            assert not any(ended.codes) and not ended.left, (ended.left, *_tails(ended))
            for one, other in zip(alone, self._found(), strict=False):
                if is_complete:
                    one, other = (_without_its_end(found) for found in (one, other))
                different = compare.differences(one, other)
                assert not different, (different, *_tails(*every))
        return [*every, ended]

    def launch(self, recipe: Recipe, trap: Trap | None = None, own_writer: bool = False) -> Ended:
        argv = flags(recipe, self.folder, self.run)
        return launch(argv, recipe.world, self.folder, trap, self._stopped, own_writer)

    def _found(self) -> tuple[dict[str, Any], dict[Any, Any], dict[str, Any]]:
        assert compare.tracked(self.run / "saved") == STEPS
        found = compare.kept(self.run, STEPS)
        return found, compare.logged(self.run), compare.recorded(self.run)

    def _check_end(self, ended: Ended, trap: Trap, before: int, is_async: bool) -> None:
        said = (trap, ended.codes, f"{ended.survived:.1f} s", *_tails(ended))
        assert not ended.left, (ended.left, *said)
        last = max([n for kind, n in compare.logged(self.run) if kind == "train"], default=0)
        tracked = compare.tracked(self.run / "saved")
        whole = (last - 1) // INTERVAL * INTERVAL
        if is_async:  # the one before is finished at the latest when the next begins
            whole -= INTERVAL
        assert tracked >= max(before, whole), (tracked, last, *said)
        if trap.end == "stop":
            assert not any(ended.codes), said
            return
        assert ended.survived < SURVIVORS, said
        if trap.end == "kill" and ended.counts.of(trap.rank, "sprung"):
            assert ended.codes[trap.rank] == -9, said
            if any(code for rank, code in enumerate(ended.codes) if rank != trap.rank):
                named = rf"ends, as rank {trap.rank} (is gone|ended)"
                assert any(re.search(named, one) for one in ended.said), said

    @contextlib.contextmanager
    def _fresh(self, on_disk: bool) -> Iterator[None]:
        """The folder `run` is empty, and a small disk by itself where it is to be filled up."""
        self.run.mkdir()
        if on_disk:
            asked = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(self.run)]
            subprocess.run(asked, check=True)
        try:
            yield
        finally:
            if on_disk:
                subprocess.run(["umount", "-l", str(self.run)], check=True)
            shutil.rmtree(self.run)


def can_mount(folder: Path) -> bool:
    """Whether small disks can be made here."""
    asked = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(asked, capture_output=True).returncode:
        return False
    subprocess.run(["umount", "-l", str(folder)], check=True)
    return True


def drawn(seed: int, alone: Alone, world: int, disks: bool) -> list[Trap]:
    """One trap, or two, somewhere in a run.

    Args:
        alone: the run in which moments are counted.
        disks: whether they can be filled up.
    """
    draw = random.Random(seed)
    traps = []
    for _ in range(1 + (draw.random() < 0.25)):
        ends = {end: weight for end, weight in _ENDS.items() if disks or end != "full disk"}
        (end,) = draw.choices(list(ends), list(ends.values()))
        rank = draw.randrange(world)
        moments = {k: w for k, w in _MOMENTS.items() if alone.counts.of(rank, k)}
        (kind,) = draw.choices(list(moments), list(moments.values()))
        kind = "save" if end == "full disk" else kind
        traps.append(Trap(end, rank, kind, 1 + int(draw.random() * alone.counts.of(rank, kind))))
    return traps


def _without_its_end(found: dict[Any, Any]) -> dict[Any, Any]:
    """What a run has that ended after its last save: the looks at its end may be missing."""
    return {
        name: value for name, value in found.items()
        if not str(name).startswith("best") and (name[1:] != (STEPS,) or name[0] == "train")
    }  # fmt: skip


def _tails(*every: Ended) -> list[str]:
    """The end of what each rank has said."""
    return [f"--- {n}\n{said[-1500:]}" for ended in every for n, said in enumerate(ended.said)]
