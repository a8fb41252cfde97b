"""slime (github.com/THUDM/slime): --custom-megatron-before-train-step-hook-path."""

from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import hosts


def before_train_step(
    dr: DRConfig, target_batch: Callable[[Any, int, int], dict[str, Any]]
) -> Callable[..., None]:
    """The hook: slime calls it in each `train_one_step`, after gradients are zeroed.

    The step that follows is regularised. The critic's steps are left alone.

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
        from slime.backends.megatron_utils.data import get_data_iterator
        from slime.backends.megatron_utils.model import train_one_step

        def target() -> None:
            data = target_batch(args, rollout_id, step_id)
            train_one_step(
                args, rollout_id, step_id, get_data_iterator(data), model, optimizer, scheduler,
                data["num_microbatches"][0], data["global_batch_sizes"][0],
            )  # fmt: skip

        hosts.regularise_next(hosts.attach(model, optimizer, dr), target)

    return hook
