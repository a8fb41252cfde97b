"""Calls of Megatron that its versions have otherwise, as the newest has them.

Megatron's training loop is imported when it is called: older versions come without it, and it has
to be imported after `cpu.enable()`.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

Hook = Callable[[list[Any]], Any]


def moe_losses() -> tuple[Any, str]:
    """The module and the name under which routers add up their losses for the log."""
    from megatron.core.transformer.moe import moe_logging

    return moe_logging, "_MOE_METRICS_TRACKER"


def model_config(args: Namespace) -> Any:
    """What `pretrain` builds a GPT model from, of Megatron's arguments."""
    from megatron.training import argument_utils

    return argument_utils.gpt_config_from_args(args)


def pretrain(
    args: Namespace, model: Any, datasets: Callable[..., Any], forward_step: Callable[..., Any],
    **options: Any,
) -> None:  # fmt: skip
    """Megatron's training, of the model that `model_config` gave."""
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, training

    container = argument_utils.pretrain_cfg_container_from_args(args, model)
    training.pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step, **options)


def change_model(
    given: tuple[Any, ...], named: dict[str, Any], mend: Callable[[Any], None],
    hooks: Sequence[tuple[str, Hook]],
) -> tuple[Any, ...]:  # fmt: skip
    """Have Megatron change the model that setup_model_and_optimizer builds.

    Args:
        given, named: its arguments.
        mend: changes the configuration that the model is built from, where there is one.
        hooks: what changes its chunks before DDP wraps them, each with the flag that asks for it.

    Returns:
        The arguments that take the place of `given`.

    Raises:
        ValueError: hooks, and the training script builds the model by itself.
    """
    model = getattr(named.get("cfg_container"), "model", None)
    mend(model)
    for flag, hook in hooks:
        if model is None:
            raise ValueError(
                f"{flag} needs a training script that gives pretrain the model's configuration, as "
                "Megatron's pretrain_gpt.py does, not a function that builds the model."
            )
        model.pre_wrap_hooks.append(hook)
    return given


def batch_on_tp_ranks(batch: dict[str, Any], *, has_cu_seqlens: bool, **options: Any) -> Any:
    """A microbatch on all tensor-parallel ranks, from the first."""
    from megatron.core.utils import get_batch_on_this_tp_rank

    return get_batch_on_this_tp_rank(batch, has_cu_seqlens=has_cu_seqlens, **options)


def batch_on_cp_ranks(batch: dict[str, Any], group: Any) -> Any:
    """This context-parallel rank's part of a microbatch's sequences."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)


def set_yarn(config: Any, args: Namespace) -> None:
    """Give a model's configuration what YaRN's rotary positions read of the flags."""
    from megatron.training.argument_utils import _apply_yarn_config_from_args

    _apply_yarn_config_from_args(config, args)


def open_checkpoints_by(opened: Callable[..., Any]) -> None:
    """Have Megatron open a checkpoint's files by opened(its own function, path, mode)."""
    from megatron.core.msc_utils import maybe_msc

    def open_(*given: Any, **named: Any) -> Any:
        return opened(maybe_msc.__getattr__("open"), *given, **named)

    maybe_msc.open = open_  # before its __getattr__
