"""The rollouts that a run trains on, beside its checkpoints: <save>/dr_rollouts/iter_NNNNNNN."""

from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from megatron_dr.mcore.arguments import part_from_args
from megatron_dr.rl import experience
from megatron_dr.rl.experience import Experience

FOLDER = "dr_rollouts"
_FIXED = ("algorithm", "prompts", "group", "epochs")


def check_same(args: Namespace, before: Namespace) -> None:
    """A run goes on only with the flags on which a cycle's rollout and its steps depend.

    Args:
        before: of the run that saved the checkpoint.

    Raises:
        ValueError: one differs, or the checkpoint is not of such a run.
    """
    rl = part_from_args(args, "rl")
    if rl is None:
        return
    saved = part_from_args(before, "rl")
    if saved is None:
        raise ValueError(_other_run(f"{args.load}: it was saved without that flag"))
    pairs = {f"--dr-rl-{name}": (getattr(saved, name), getattr(rl, name)) for name in _FIXED}
    for name in ("global_batch_size", "seq_length"):
        pairs["--" + name.replace("_", "-")] = (getattr(before, name), getattr(args, name))
    for flag, (then, now) in pairs.items():
        if then != now:
            raise ValueError(
                f"{args.load}: the checkpoint is of a run with {flag} {then}, and a cycle that is "
                f"under way can't go on with {now}: give {flag} {then}, or --finetune to begin a "
                "new run from it."
            )


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
        raise ValueError(_other_run(f"{path}: no such file"))
    return experience.load(path)


def _other_run(what: str) -> str:
    return (
        f"{what}, so the checkpoint is not of a run with --dr-rl-algorithm: give --finetune to "
        "begin a new run from it."
    )


def _path(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}.safetensors"
