"""slime (github.com/THUDM/slime): --custom-megatron-before-train-step-hook-path."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.hf.from_megatron import checkpoint_folder
from megatron_dr.hf.torch_dist import Reader
from megatron_dr.mcore import hosts
from megatron_dr.mcore.attach import Handle, attached
from megatron_dr.mcore.hosts import state
from megatron_dr.mcore.say import say

_STATE = "megatron_dr"  # of Megatron's arguments, which its checkpoints hold


def before_train_step(
    dr: DRConfig, target_batch: Callable[[Any, int, int], dict[str, Any]]
) -> Callable[..., None]:
    """The hook: slime calls it in each `train_one_step`, after gradients are zeroed.

    The step that follows is regularised. The critic's steps are left alone. The handle's state is
    among the arguments that slime's (Megatron's) checkpoints hold, and taken up from --load at the
    first step.

    Args:
        dr: what to project on what.
        target_batch: (args, rollout_id, step_id) -> this rank's target samples, in the form of
            slime's own rollout data of one step: lists by key, with `micro_batch_indices`,
            `num_microbatches` [1] and `global_batch_sizes` [1].
    """

    def hook(
        args: Any, rollout_id: int, step_id: int, model: Any, optimizer: Any, scheduler: Any
    ) -> None:
        if hosts.reaching() or getattr(model[0], "role", "actor") != "actor":
            return
        if os.environ.get("ENABLE_ROUTING_REPLAY", "0") == "1":
            raise ValueError(hosts.REPLAY.format("slime"))
        from slime.backends.megatron_utils.data import get_data_iterator
        from slime.backends.megatron_utils.model import train_one_step

        def target() -> None:
            data = target_batch(args, rollout_id, step_id)
            training.samples = data["global_batch_sizes"][0]
            train_one_step(
                args, rollout_id, step_id, get_data_iterator(data), model, optimizer, scheduler,
                data["num_microbatches"][0], data["global_batch_sizes"][0],
            )  # fmt: skip

        begun = attached(model) is None
        handle = hosts.attach(model, optimizer, dr)
        if begun:
            _load(handle, args)
        training = hosts.regularise_next(handle, target)
        training.after = lambda: setattr(args, _STATE, state.packed(handle))

    return hook


def _load(handle: Handle, args: Any) -> None:
    """The state of the checkpoint that slime has loaded; where it has none, that is said."""
    load = getattr(args, "load", None)
    if not load or getattr(args, "finetune", False):
        return
    try:
        found = state.of_first_rank(lambda: _saved(Path(load), getattr(args, "ckpt_step", None)))
        if found is not None:
            state.unpack(handle, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"note: megatron_dr begins anew, as its state in {load} can't be read: {error}")
    else:
        if found is None:
            say(f"note: {load} was saved without megatron_dr: its state begins anew")


def _saved(load: Path, step: int | None) -> Any:
    """Of Megatron's checkpoint; a Hugging Face model, which slime loads as well, has none.

    Raises:
        ValueError, OSError: it can't be read.
    """
    folder = load / f"iter_{step:07d}" if step else checkpoint_folder(load)
    if not (folder / ".metadata").exists():
        return None
    return getattr(Reader(folder).common().get("args"), _STATE, None)
