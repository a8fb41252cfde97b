"""The rollouts that a run trains on, beside its checkpoints: <save>/dr_rollouts/iter_NNNNNNN."""

from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from megatron_dr.rl import experience
from megatron_dr.rl.experience import Experience
from megatron_dr.rl_config import RLConfig

FOLDER = "dr_rollouts"


def resumes(args: Namespace) -> bool:
    """Whether the run goes on from a checkpoint's iteration, rather than begins."""
    return bool(args.load) and args.iteration > 0


def save(args: Namespace, iteration: int, experiences: dict[str, Experience]) -> None:
    """On rank 0; rollouts of checkpoints that are no longer there are removed."""
    if dist.get_rank() != 0 or not experiences:
        return
    folder = Path(args.save) / FOLDER
    experience.save(_path(folder, iteration), experiences)
    for path in folder.glob("iter_*.safetensors"):
        if path != _path(folder, iteration) and not (folder.parent / path.stem).is_dir():
            path.unlink()


def load(args: Namespace, rl: RLConfig) -> dict[str, Experience]:
    """Those of the checkpoint that was loaded.

    Raises:
        ValueError: there are none, or they are of other flags.
    """
    path = _path(Path(args.load) / FOLDER, args.iteration)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, so the checkpoint is not of a run with --dr-rl-algorithm: "
            "give --finetune to begin a new run from it."
        )
    found = experience.load(path)
    shape, wanted = list(found["general"].tokens_NT.shape), [rl.completions, args.seq_length]
    if shape != wanted:
        raise ValueError(
            f"{path}: the rollout of the checkpoint has {shape[0]} completions of up to {shape[1]} "
            f"tokens, but --dr-rl-prompts x --dr-rl-group is {wanted[0]} and --seq-length "
            f"{wanted[1]}: give the flags of the run that saved it."
        )
    return found


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}.safetensors"
