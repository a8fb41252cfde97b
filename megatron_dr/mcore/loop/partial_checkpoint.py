"""Checkpoints of a model without what parts add, such as adapters, loaded into one with them."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core import dist_checkpointing
from megatron.training import get_args

from megatron_dr.mcore import errors
from megatron_dr.mcore.loop import changes, parts


def load(
    stock: Callable[..., Any], sharded_state_dict: dict[str, Any], checkpoint: str, *rest: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """`dist_checkpointing.load`, of which added parts that no checkpoint has are no concern.

    Where the checkpoint has no adapters at all, they are neither asked of it nor missed after: the
    state that is returned has the values that they have. So with the value head. Everything else is
    as strict as asked, and a checkpoint with other adapters than the model's is still an error.

    Megatron's own `--dist-ckpt-strictness log_unexpected` is no way: it drops a tensor that is
    absent, and then misses it where it puts gate and up together.

    Args:
        stock: Megatron's function.
        sharded_state_dict: what is wanted; a model chunk's entries are under a key of their own.
        checkpoint: its folder.
    """
    _check_changes(checkpoint)
    chunks = [chunk for chunk in sharded_state_dict.values() if isinstance(chunk, dict)]
    wanted = {part for part in parts.PARTS for chunk in chunks if any(map(part.owns, chunk))}
    if wanted:
        found = dist_checkpointing.load_tensors_metadata(checkpoint)
        wanted -= {part for part in wanted if any(map(part.owns, found))}
    if not wanted:
        return stock(sharded_state_dict, checkpoint, *rest, **kwargs)
    kept: dict[str, dict[str, Any]] = {}
    for name, chunk in sharded_state_dict.items():
        keys = list(chunk) if isinstance(chunk, dict) else []
        absent = [key for key in keys if any(part.owns(key) for part in wanted)]
        kept[name] = {key: chunk.pop(key).data for key in absent}
    loaded = stock(sharded_state_dict, checkpoint, *rest, **kwargs)
    state = loaded[0] if isinstance(loaded, tuple) else loaded
    for name, values in kept.items():
        if values:
            state[name].update(values)
    return loaded


def _check_changes(checkpoint: str) -> None:
    """Refuse what a resume can't have otherwise before tensors of other shapes are asked for."""
    before = dist_checkpointing.load_common_state_dict(checkpoint).get("args")
    if before is None or get_args().finetune:
        return
    with errors.refused():
        changes.check(get_args(), before, speak=False)
        _check_experts(get_args(), before)


def _check_experts(args: Namespace, before: Namespace) -> None:
    """Megatron has two optimizers where experts are on several ranks, and saves one otherwise."""
    now, then = (getattr(one, "expert_model_parallel_size", 1) for one in (args, before))
    has_state = not args.no_load_optim and not getattr(before, "no_save_optim", False)
    if args.num_experts and has_state and (now > 1) != (then > 1):
        raise ValueError(
            f"--expert-model-parallel-size {now}, and the checkpoint's run had {then}: Megatron "
            "does not load the optimizer's state of experts on one rank into experts on several, "
            "nor the other way: give what that run had, or --no-load-optim."
        )
