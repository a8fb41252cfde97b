"""Domain rows from Megatron's data flags: names and weights that every rank knows, and refusals."""

import argparse
import os

from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dr.data.domains import DomainPlan
from megatron_dr.data.records import SUFFIXES
from megatron_dr.mcore import compat


def domain_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The general training corpora in the blend's order: the path's last part, no ending.

    Raises:
        ValueError: no corpus, a single one, or two of one name.
    """
    paths, _ = _training_blend(args)
    names = tuple(_name(path) for path in paths)
    for number, name in enumerate(names):
        first = names.index(name)
        if first < number:
            raise ValueError(
                f"--dr-rows domain knows corpora by name, but {paths[first]} and {paths[number]} "
                f"are both named {name}: rename one."
            )
    return names


def _name(path: str) -> str:
    stem, ending = os.path.splitext(os.path.basename(os.path.normpath(path)))
    return stem if ending in SUFFIXES else stem + ending


def domain_weights(args: argparse.Namespace) -> tuple[float, ...]:
    """The blend's weights as given, on any scale, in the order of the names.

    Raises:
        ValueError: no corpus, a single one, or no weights: Megatron then goes by the corpora's
            sizes, which ranks that read no data don't know.
    """
    paths, weights = _training_blend(args)
    if weights is None:
        raise ValueError(
            "--dr-rows domain needs a weight before each path, since not all ranks read the data: "
            f"say {' '.join(f'1 {path}' for path in paths)} for equal shares."
        )
    return tuple(weights)


def check(args: argparse.Namespace) -> None:
    """Raise ValueError where flags or data can't give microbatches of one domain.

    Args:
        args: Megatron's arguments, validated by Megatron.
    """
    domain_names(args)
    DomainPlan(domain_weights(args))
    if args.dataloader_type != "single":
        raise ValueError(
            "--dr-rows domain needs samples in order, which --dataloader-type "
            f"{args.dataloader_type} does not give: drop that flag."
        )
    if args.phase_transition_iterations:
        raise ValueError(
            "--dr-rows domain counts microbatches over the whole run, and "
            "--phase-transition-iterations starts the data anew: drop that flag."
        )
    together = args.micro_batch_size * args.data_parallel_size
    if args.consumed_train_samples % together:
        raise ValueError(
            f"--dr-rows domain can't resume after {args.consumed_train_samples} samples, not a "
            f"multiple of --micro-batch-size x data-parallel size = {together}: resume with the "
            "sizes of the run before."
        )


def data_ranks_per_row() -> int:
    """P: neighbouring data-parallel ranks that form one row, as expert-parallel peers do."""
    return compat.ranks_per_row() // mpu.get_context_parallel_world_size()


def _training_blend(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    if blend_per_split is not None:
        blend = blend_per_split[Split.train.value]
    paths, weights = blend or ([], None)
    if len(paths) < 2:
        raise ValueError(
            "--dr-rows domain needs at least two corpora, each after its weight, in --data-path or "
            f"--train-data-path, but there is {paths[0] if paths else 'none'}: add one, or use "
            "--dr-rows slot."
        )
    return paths, weights
