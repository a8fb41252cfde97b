"""The rollouts that a run trains on, beside its checkpoints: <save>/dr_rollouts/iter_NNNNNNN."""

from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from megatron_dr.rl import experience
from megatron_dr.rl.experience import Experience

FOLDER = "dr_rollouts"


def save(
    args: Namespace, iteration: int, experiences: dict[str, Experience], state: dict[str, float]
) -> None:
    """On rank 0; rollouts of checkpoints that are no longer there are removed."""
    if dist.get_rank() != 0 or not experiences:
        return
    folder = Path(args.save) / FOLDER
    experience.save(_path(folder, iteration), experiences, state)
    for path in folder.glob("iter_*.safetensors"):
        if path != _path(folder, iteration) and not (folder.parent / path.stem).is_dir():
            path.unlink()


def load(args: Namespace) -> tuple[dict[str, Experience], dict[str, float]]:
    """Those of the checkpoint that was loaded, and the state of what makes the next ones.

    Raises:
        ValueError: there are none.
    """
    path = _path(Path(args.load) / FOLDER, args.iteration)
    if not path.is_file():
        raise ValueError(other_run(f"{path}: no such file"))
    return experience.load(path)


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}.safetensors"


def other_run(what: str) -> str:
    """The sentence on a checkpoint that no run by rewards has saved."""
    return (
        f"{what}, so the checkpoint is not of a run with --dr-rl-algorithm: give --finetune to "
        "begin a new run from it."
    )
