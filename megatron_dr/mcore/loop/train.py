"""Megatron's own training loop with the plugin: `torchrun ... -m megatron_dr.train <flags>`.

The model is Megatron's GPT model built from its flags, the loop is `megatron.training.pretrain`:
checkpoints, logging, validation, schedules and flags are Megatron's.
"""

import sys
import warnings
from functools import partial

import torch

from megatron_dr.mcore import cpu, errors


def main(store: torch.distributed.Store | None = None) -> None:  # type: ignore[name-defined]
    """The entry; flags from the command line.

    Args:
        store: where ranks meet, instead of torchrun's.
    """
    warnings.filterwarnings("ignore", module="megatron")
    cpu.enable_if_asked()  # before Megatron is imported
    from megatron_dr.mcore import compat

    with errors.refused():
        compat.check_loop()
    _run(store)


def import_megatron() -> None:
    """Import what a run needs, so that forks of this process don't: after `cpu.enable()`."""
    import megatron.training  # noqa: F401

    import megatron_dr.mcore.data.source  # noqa: F401
    import megatron_dr.mcore.dpo.source  # noqa: F401
    import megatron_dr.mcore.rl.source  # noqa: F401
    from megatron_dr.mcore.loop import adaptor  # noqa: F401


def _run(store: torch.distributed.Store | None) -> None:  # type: ignore[name-defined]
    from megatron.training import training
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dr.mcore import compat
    from megatron_dr.mcore.loop import (
        adaptor,
        agreement,
        first_line,
        forward,
        model_config,
        script_flags,
        validation,
    )  # fmt: skip

    agreement.meet_in(store)
    adaptor.enable()
    training.training_log = partial(first_line.log, training.training_log)
    validation.early(script_flags.refuse_given, sys.argv[1:])
    validation.of_script[:] = [script_flags.refuse_values]
    defaults = {"tokenizer_type": "GPT2BPETokenizer", "eval_interval": 1000}
    args = parse_and_validate_args(args_defaults=defaults)
    model = validation.early(validation.of_megatron, compat.model_config, args)
    model_config.mend(model, args)
    compat.pretrain(
        args, model, adaptor.datasets_provider, forward.forward_step, store=store,
        get_embedding_ranks=partial(_embedding_ranks, not args.untie_embeddings_and_output_weights),
    )  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _embedding_ranks(tied: bool, pp_ranks: list[int]) -> list[int]:
    """Stages that hold the embedding: the first, and the last where the output layer is tied."""
    return sorted({pp_ranks[0], pp_ranks[-1]}) if tied else [pp_ranks[0]]
