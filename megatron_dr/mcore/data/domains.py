"""Domain rows from Megatron's data flags: names, weights and their order, on every rank alike."""

import argparse
import os

from megatron.core import mpu
from megatron.core.datasets.utils import Split

from megatron_dr.data.domains import Order, domains_of_step
from megatron_dr.data.files import ending
from megatron_dr.mcore import compat


def of_step(plan: Order, args: argparse.Namespace, num_microbatches: int) -> list[int]:
    """Domain of each of this rank's general microbatches in the step that is under way."""
    ranks = args.data_parallel_size
    first = args.consumed_train_samples // (args.micro_batch_size * ranks)
    rank, peers = mpu.get_data_parallel_rank(), compat.data_ranks_per_row()
    return domains_of_step(plan, first, num_microbatches, rank, ranks, peers)


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
    name = os.path.basename(os.path.normpath(path))
    return name[: len(name) - len(ending(name))]


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


def _training_blend(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    from megatron.training.utils import get_blend_and_blend_per_split

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
