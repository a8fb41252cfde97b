"""Checkpoints of a model without adapters, loaded into one with adapters."""

from collections.abc import Callable
from typing import Any

from megatron.core import dist_checkpointing

from megatron_dr.mcore.lora_layers import NAMES


def load(
    stock: Callable[..., Any], sharded_state_dict: dict[str, Any], checkpoint: str, *rest: Any,
    **kwargs: Any,
) -> Any:  # fmt: skip
    """`dist_checkpointing.load`, of which adapters that no checkpoint has are no concern.

    Where the checkpoint has no adapters at all, they are neither asked of it nor missed after: the
    state that is returned has the values that they have. Everything else is as strict as asked, and
    a checkpoint with other adapters than the model's is still an error.

    Megatron's own `--dist-ckpt-strictness log_unexpected` is no way: it drops a tensor that is
    absent, and then misses it where it puts gate and up together.

    Args:
        stock: Megatron's function.
        sharded_state_dict: what is wanted; a model chunk's entries are under a key of their own.
        checkpoint: its folder.
    """
    if not any(_adapters(part) for part in sharded_state_dict.values()) or any(
        _is_adapter(key) for key in dist_checkpointing.load_tensors_metadata(checkpoint)
    ):
        return stock(sharded_state_dict, checkpoint, *rest, **kwargs)
    kept = {}
    for name, part in sharded_state_dict.items():
        kept[name] = {key: part.pop(key).data for key in _adapters(part)}
    loaded = stock(sharded_state_dict, checkpoint, *rest, **kwargs)
    state = loaded[0] if isinstance(loaded, tuple) else loaded
    for name, values in kept.items():
        if values:
            state[name].update(values)
    return loaded


def _adapters(part: Any) -> list[str]:
    """Keys of adapters in a model chunk's entries; none in anything else."""
    return [key for key in part if _is_adapter(key)] if isinstance(part, dict) else []


def _is_adapter(key: Any) -> bool:
    return isinstance(key, str) and any(f".{name}." in key for name in NAMES)
