"""A target that is used for several steps, beside a run's checkpoints: <save>/dr_target.

Only those between two target passes have one: <save>/dr_target/iter_NNNNNNN.
"""

import shutil
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_dr.mcore.step.handle import Handle

FOLDER = "dr_target"


def save(args: Namespace, iteration: int, handle: Handle, steps: int) -> None:
    """For a checkpoint of this iteration, after so many steps (collective); those of checkpoints
    that are no longer there are removed."""
    if not args.save or handle.dr.target_refresh == 1:
        return
    kept, path = handle.rows.kept(steps), _path(args.save, iteration)
    if dist.get_rank() == 0:
        for other in path.parent.glob("iter_*"):
            if other == path or not (path.parent.parent / other.name).is_dir():
                shutil.rmtree(other)
        if kept:
            path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    if kept:
        dist_checkpointing.save(kept, str(path))


def load(args: Namespace, handle: Handle, steps: int) -> None:
    """That of the checkpoint that the run goes on from (collective).

    Raises:
        ValueError: there is none, or it is scored otherwise.
    """
    if steps % handle.dr.target_refresh == 0:
        return
    path, tokens = _path(args.load, args.iteration), args.seq_length
    if path.is_dir() and handle.rows.load_kept(path, args.micro_batch_size, tokens):
        return
    if "dr-target-refresh" not in (args.dr_changed_ok or ()):
        what = "scored otherwise than in this run" if path.is_dir() else "no such folder"
        raise ValueError(
            f"{path}: {what}, so the target that --dr-target-refresh would use until step "
            f"{steps - steps % handle.dr.target_refresh + handle.dr.target_refresh} is missing: "
            "resume with the flags and folders of the run before, or draw one at once with "
            "--dr-changed-ok dr-target-refresh."
        )


def _path(folder: str, iteration: int) -> Path:
    return Path(folder) / FOLDER / f"iter_{iteration:07d}"
