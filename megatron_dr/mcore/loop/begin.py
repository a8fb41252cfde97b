"""What is looked at before a run begins, so that it does not end at its first checkpoint."""

import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.hf import assets
from megatron_dr.mcore import errors
from megatron_dr.mcore.loop import rate, tracker
from megatron_dr.mcore.say import say

_SAVED = {  # where checkpoints go, and the kind of them that goes there
    "save": None,
    "non_persistent_global_ckpt_dir": "global",
    "non_persistent_local_ckpt_dir": "local",
}


def check_folders(args: Namespace) -> None:
    """Raise ValueError where checkpoints can't be written, or the one to load isn't there."""
    for name, kind in _SAVED.items():
        if getattr(args, name) and kind in (None, args.non_persistent_ckpt_type):
            _check_written("--" + name.replace("_", "-"), Path(getattr(args, name)))
    for folder in (args.load, args.pretrained_checkpoint):
        path = Path(folder or "") / tracker.NAME
        if folder and not args.ckpt_step and path.is_file():
            _check_tracker(path, is_loaded=True)
    _check_evaluated(args)


def _check_evaluated(args: Namespace) -> None:
    """Megatron begins with random weights where --load has none, for a run's first start; there is
    no such start where nothing is trained."""
    if not args.skip_train or not args.load:
        return
    elsewhere = (args.ckpt_step, args.pretrained_checkpoint, args.non_persistent_ckpt_type)
    if not any(elsewhere) and not (Path(args.load) / tracker.NAME).is_file():
        raise ValueError(
            f"--load {args.load}: no checkpoint is there (it has no {tracker.NAME}), and with "
            "--skip-train random weights would be evaluated: name a folder that has one."
        )


def _check_written(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"room for a checkpoint?")
    except OSError as error:
        raise ValueError(
            f"{flag} {folder}: checkpoints can't be written there ({error.strerror}): mend it, or "
            "name another folder."
        ) from None


def read_tracker(stock: Callable[..., Any], name: str, *rest: Any, **kwargs: Any) -> Any:
    """Megatron's `read_metadata`, which leaves with exit code 0 where a file says no iteration."""
    with errors.refused():
        if os.path.isfile(name):
            _check_tracker(Path(name))
    return stock(name, *rest, **kwargs)


def _check_tracker(path: Path, is_loaded: bool = False) -> None:
    """`is_loaded`: what it names is what is loaded."""
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    is_number = text.isascii() and text.isdigit() and len(text) < 20
    saved = sorted(folder.name for folder in path.parent.glob("iter_*"))
    if text == "release" or (is_number and not is_loaded):
        return
    if is_number and f"iter_{int(text):07d}" in saved:
        return
    wrong = f"says {text[:20]!r}" if text else "is empty"
    wrong += ", and there is no such checkpoint" * is_number
    last = f" (the newest folder is {saved[-1]})" if saved else ""
    raise ValueError(
        f"{path}: it {wrong}, where the iteration of the last whole checkpoint belongs: write that "
        f"number{last}, or delete the file to begin anew."
    )


def load(stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
    """Megatron's `load_checkpoint`; what it can't load ends the run with exit code 2, not 0."""
    try:
        return stock(*rest, **kwargs)
    except SystemExit as end:
        if end.code:
            raise
        with errors.refused():
            raise ValueError("no checkpoint was loaded; Megatron says why above.") from None
    except RuntimeError as error:  # on every rank
        found = re.search(
            r"mismatch after resume \(.* vs (\(.*\)) from checkpoint\): not", str(error)
        )
        if found is None:
            raise
        with errors.refused():
            raise ValueError(
                f"the checkpoint's optimizer can only be loaded with the tensor and pipeline sizes "
                f"that it was saved with, {found[1]}: resume with those; to change them, have the "
                "run before save with --dist-ckpt-optim-fully-reshardable; or give --no-load-optim."
            ) from None


def carry_assets(args: Namespace) -> None:
    """Give --save the Hugging Face configuration and tokenizer of what is loaded, on rank 0."""
    if args.save and int(os.environ.get("RANK", "0")) == 0:
        for loaded in filter(None, (args.load, args.pretrained_checkpoint)):
            assets.carry(Path(loaded), Path(args.save))


def leave_if_complete(args: Namespace) -> None:
    """End a run that has nothing left to train with exit code 0; its checkpoint is loaded."""
    if args.skip_train or not args.train_iters or args.iteration < args.train_iters:
        return
    asks = bool(getattr(args, "dr_generate", None))
    answers = "; with --skip-train it answers --dr-generate" * asks
    say(
        f"{args.load} is complete: it has {args.iteration} iterations of {args.train_iters}; raise "
        f"--train-iters to go on, with {rate.OVERRIDE}{answers}"
        if args.train_samples is None else
        f"{args.load} is complete: it has all of --train-samples {args.train_samples}; raise it to "
        f"go on, with {rate.OVERRIDE}{answers}"
    )  # fmt: skip
    raise SystemExit(0)
