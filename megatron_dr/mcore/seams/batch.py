"""How the target's batch is divided into microbatches."""

from argparse import Namespace

from megatron_dr.config.dr import DRConfig, TargetConfig


def num_target_microbatches(args: Namespace, dr: DRConfig, target: TargetConfig) -> int:
    """Target microbatches per step and rank that runs any.

    Raises:
        ValueError: the target batch can't be divided into them.
    """
    ranks: int = dr.target_ranks or args.data_parallel_size
    if dr.merges_target:
        general: int = args.global_batch_size // args.micro_batch_size
        if target.target_batch_size % general:
            raise ValueError(
                f"--dr-target-batch-size {target.target_batch_size} is not a multiple of the "
                f"{general} general microbatches of a step, as --dr-target-pass merged needs: "
                "change it."
            )
        return general // ranks
    together: int = args.micro_batch_size * ranks
    if target.target_batch_size % together:
        what = "--dr-target-ranks" if dr.target_ranks else "data-parallel size"
        raise ValueError(
            f"--dr-target-batch-size {target.target_batch_size} is not a multiple of "
            f"--micro-batch-size x {what} = {together}: change one of them."
        )
    return target.target_batch_size // together
