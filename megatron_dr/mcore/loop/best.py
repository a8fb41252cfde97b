"""`--dr-keep-best`: the checkpoint that did best on the held-out target, in <save>/best.

The folder is one of Megatron's, with a tracker file and one checkpoint, so that a run's --load
and a conversion take it as any other. A new best is written whole before the one before it is
removed: a crash leaves at least one, which the tracker names. Beside it, best.json:

    {"iteration": 40, "target loss": 2.31, "former": null}

`former` is what best.json said before, as long as that checkpoint may be the whole one.
"""

import json
import math
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dr.config.target import TargetConfig
from megatron_dr.hf import assets
from megatron_dr.mcore import collectives
from megatron_dr.mcore.loop import tracker
from megatron_dr.mcore.say import say

FOLDER, FILE = "best", "best.json"
_BESIDE = ("dr_reference", "dr_reference_log_probs.safetensors")  # of a run, not of a checkpoint


def check(args: Namespace, target: TargetConfig) -> None:
    """Raise ValueError where there is nothing to judge by, or nowhere to keep it; after Megatron's
    own checks of its arguments."""
    wanted = {
        "--dr-keep-best": target.keep_best,
        "--dr-target-test-data": target.target_test_data,
        "--dr-target-valid-data": target.target_valid_data,
    }
    if args.multiple_validation_sets and not args.full_validation:
        raise ValueError(
            "--multiple-validation-sets needs --full-validation: without it Megatron fails when it "
            "reads the data: give both."
        )
    if args.full_validation and not args.multiple_validation_sets:
        raise ValueError(
            "--full-validation needs --multiple-validation-sets, of one set too: without it "
            "Megatron fails at the first evaluation: give both, or --eval-iters."
        )
    if args.skip_train:
        _check_alone(target, wanted)
    for flag in (flag for flag, given in wanted.items() if given):
        if not args.eval_iters and not args.full_validation:
            raise ValueError(
                f"{flag} needs validation: give held-out data, and --eval-iters above 0."
            )
    if not target.keep_best:
        return
    missing = {
        "--save, the folder that it keeps it in": args.save,
        "--dr-target-valid-data, by which it is judged": target.target_valid_data,
        "--eval-interval, the steps between two looks": args.eval_interval,
    }
    for what, value in missing.items():
        if not value:
            raise ValueError(f"--dr-keep-best needs {what}: give it, or drop the flag.")


def _check_alone(target: TargetConfig, wanted: dict[str, Any]) -> None:
    """Without training nothing is evaluated but Megatron's own sets, and nothing written."""
    wanted = {
        **wanted,
        "--dr-metrics": target.metrics and not target.generate,
        "--dr-record": target.record,
    }
    instead = {
        "--dr-target-valid-data": ", or give its data as --valid-data-path",
        "--dr-metrics": ", or have answers to write with --dr-generate",
    }
    for flag in (flag for flag, given in wanted.items() if given):
        raise ValueError(
            f"{flag} is of a run that trains: drop it, or --skip-train{instead.get(flag, '')}."
        )


class Best:
    """The best checkpoint of what is saved in one folder; a resumed run knows it.

    Args:
        name: of the value in a validation, and `higher` whether more of it is better.
        write: Megatron's `save_checkpoint_and_time`.
    """

    def __init__(self, args: Namespace, name: str, higher: bool, write: Callable[..., Any]) -> None:
        self.args, self.name, self.higher, self._write = args, name, higher, write
        self.folder = Path(args.save) / FOLDER
        self.known: dict[str, Any] | None = None
        self._new: dict[str, Any] | None = None
        found = _read(self.folder) if dist.get_rank() == 0 else None
        found = collectives.of_all_ranks(found)[0]
        self._before: int | None = None  # kept by a run that may have ended before it said so
        if found is not None and name in found:
            self.known, self._before = found, found["iteration"]
            if dist.get_rank() == 0:
                self._is_whole(found)
            say(f"best {name} so far: {found[name]:.6g} of iteration {found['iteration']}, kept in "
                f"{self.folder}")  # fmt: skip

    def see(self, iteration: int, values: dict[str, Any]) -> None:
        """A validation of this iteration, by name, on a last stage (collective)."""
        own = values.get(self.name)
        value = collectives.of_all_ranks(None if own is None else float(own))[-1]
        if value is None or not math.isfinite(value):
            return
        if self.known is not None:
            if iteration == self.known["iteration"]:
                return
            worse, better = sorted((value, self.known[self.name]), reverse=not self.higher)
            if value != better or worse == better:
                return
        self._new = {"iteration": iteration, self.name: value}

    def save(self, iteration: int, *state: Any, train_data_iterator: Any) -> dict[str, Any] | None:
        """Keep the model of this iteration where it was found the best (collective).

        Args:
            state: model, optimizer, scheduler and FLOPs, as Megatron saves them.

        Returns:
            What best.json says; None where nothing is kept. Of a step that runs again, whose model
            is kept already, it is said again.
        """
        new, self._new = self._new, None
        if new is None and iteration == self._before:
            self._before = None
            return self.known
        if new is None or new["iteration"] != iteration:
            return None
        if dist.get_rank() == 0:
            self._make_room(new)
        dist.barrier()
        with _saving_in(self.args, self.folder):
            self._write(iteration, *state, {}, train_data_iterator=train_data_iterator)
        dist.barrier()  # the new one is whole, and the tracker names it
        if dist.get_rank() == 0:
            self._is_whole(new)
        before = "" if self.known is None else (
            f"; the best before was {self.known[self.name]:.6g} of iteration "
            f"{self.known['iteration']}"
        )  # fmt: skip
        say(f"best {self.name}: {new[self.name]:.6g}, of iteration {iteration}, kept in "
            f"{self.folder}{before}")  # fmt: skip
        self.known = new
        return new

    def _is_whole(self, new: dict[str, Any]) -> None:
        """On rank 0: the tracker names it, and no other is needed any more."""
        _note(self.folder, {**new, "former": None})
        _remove_others(self.folder, new["iteration"])

    def _make_room(self, new: dict[str, Any]) -> None:
        """On rank 0: nothing is where the new one goes, and best.json tells either one's value."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_others(self.folder, _tracked(self.folder))  # what a crash left half written
        shutil.rmtree(_path(self.folder, new["iteration"]), ignore_errors=True)
        assets.carry(Path(self.args.save), self.folder)
        for name in _BESIDE:
            _linked(Path(self.args.save) / name, self.folder / name)
        _note(self.folder, {**new, "former": self.known})


@contextmanager
def _saving_in(args: Namespace, folder: Path) -> Any:
    """Megatron saves there, at once, and removes nothing itself."""
    own = {"save": str(folder), "async_save": False, "save_retain_interval": None}
    before = {name: getattr(args, name) for name in own}
    vars(args).update(own)
    try:
        yield
    finally:
        vars(args).update(before)


def _read(folder: Path) -> dict[str, Any] | None:
    """What is known of the checkpoint that the tracker names."""
    iteration = _tracked(folder)
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if iteration is None or not isinstance(found, dict):
        return None
    for one in (found, found.get("former")):
        if not isinstance(one, dict) or one.get("iteration") != iteration:
            continue
        if _path(folder, iteration).is_dir():
            return {name: value for name, value in one.items() if name != "former"}
    return None


def _tracked(folder: Path) -> int | None:
    """The iteration of the whole checkpoint; None without one."""
    try:
        return int((folder / tracker.NAME).read_text())
    except (OSError, ValueError):
        return None


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def _note(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def _remove_others(folder: Path, iteration: int | None) -> None:
    for path in folder.glob("iter_*"):
        if iteration is None or path != _path(folder, iteration):
            shutil.rmtree(path)


def _linked(source: Path, target: Path) -> None:
    """A file or folder once more, which takes no room where the disk has links."""
    if target.exists() or not source.exists():
        return

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copyfile(one, other)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link)
    else:
        link(str(source), str(target))
