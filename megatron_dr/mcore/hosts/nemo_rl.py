"""NeMo-RL (github.com/NVIDIA-NeMo/RL): its Megatron policy worker, by worker_extension_cls_fqn."""

from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state
from megatron.core.utils import get_model_config

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import hosts
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.hosts import state


def worker_class(dr: DRConfig, target_batch: Callable[[Any, Any], Any]) -> type:
    """NeMo-RL's Megatron policy worker, whose `train` is regularised: each global batch is a step.

    Evaluation and log-probabilities are NeMo-RL's own. The streaming train step (begin_train_step,
    train_microbatch, finish_train_step) is not regularised. The handle's state is beside the
    weights of NeMo-RL's checkpoints; where NeMo-RL moves the gradients to the CPU, the rows'
    buffers are freed until the next step.

    Args:
        target_batch: (the worker, the general data) -> this rank's target samples of one step, in
            the form of the general data.

    Raises:
        ValueError: by the worker that is made: rows or dials that can't be, routes that are
            replayed, auxiliary losses of experts.
    """
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

    class RegularisedWorker(MegatronPolicyWorkerImpl):  # type: ignore[misc]
        def __init__(
            self, config: Any, tokenizer: Any, weights_path: str | None = None, *args: Any,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            super().__init__(config, tokenizer, weights_path, *args, **kwargs)
            if getattr(self, "optimizer", None) is not None:
                _check(self)
                handle = hosts.attach(self.model, self.optimizer, dr)  # or refused here
                if weights_path is not None:
                    state.load(handle, weights_path)

        def save_checkpoint(self, weights_path: str, *args: Any, **kwargs: Any) -> Any:
            handle = attached(self.model)
            if handle is not None:
                state.save(handle, weights_path)
            return super().save_checkpoint(weights_path, *args, **kwargs)

        def offload_before_refit(self) -> Any:
            handle = attached(self.model)
            if handle is not None:
                handle.offload()
            return super().offload_before_refit()

        def train(
            self, data: Any, loss_fn: Any, eval_mode: bool = False, gbs: int | None = None,
            mbs: int | None = None, **rest: Any,
        ) -> Any:  # fmt: skip
            if eval_mode:
                return super().train(data, loss_fn, eval_mode, gbs, mbs, **rest)
            handle = hosts.attach(self.model, self.optimizer, dr)

            def target() -> None:
                batch = target_batch(self, data)
                if dr.alpha_style == "auto":
                    training.samples = hosts.of_data_ranks(batch.size)
                forward_backward(self, batch, loss_fn, mbs)

            with hosts.regularised(handle, target) as training:
                return super().train(data, loss_fn, eval_mode, gbs, mbs, **rest)

    return RegularisedWorker


def _check(worker: Any) -> None:
    """What NeMo-RL sets up for the general batch alone, and the target's microbatches would get."""
    if getattr(worker, "_router_replay_enabled", False):
        raise ValueError(hosts.REPLAY.format("NeMo-RL"))
    config = get_model_config(worker.model)
    names = ("moe_aux_loss_coeff", "moe_z_loss_coeff")
    given = [name for name in names if config.num_moe_experts and _is_set(config, name)]
    if given:
        raise ValueError(
            f"megatron_dr does not support {' and '.join(given)} in NeMo-RL, which scales these "
            "losses by the tokens of the general batch, the target's microbatches too: set 0."
        )


def _is_set(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return any(value) if isinstance(value, list) else bool(value)


def forward_backward(worker: Any, data: Any, loss_fn: Any, mbs: int | None = None) -> Any:
    """NeMo-RL's forward and backward of one batch, by the functions that its `train` calls."""
    from nemo_rl.models.megatron.data import get_microbatch_iterator, process_global_batch
    from nemo_rl.models.megatron.train import LossPostProcessor, megatron_forward_backward

    timer = worker.mcore_state.straggler_timer
    fused = worker.cfg["megatron_cfg"].get("use_fused_linear_logprobs", False)
    group = parallel_state.get_data_parallel_group()
    whole = process_global_batch(
        data, loss_fn=loss_fn, dp_group=group, batch_idx=0, batch_size=data.size
    )
    iterator, number, size, _, length = get_microbatch_iterator(
        whole["batch"], worker.cfg, mbs or worker.cfg["train_micro_batch_size"],
        straggler_timer=timer, delegate_pack_to_model=worker.delegate_pack_to_model,
        delegate_mtp_loss_mask_to_model=worker.delegate_mtp_loss_mask_to_model,
        model_slices_context_parallel_inputs=worker.model_slices_context_parallel_inputs,
    )  # fmt: skip
    loss = LossPostProcessor(
        loss_fn=loss_fn, cfg=worker.cfg, num_microbatches=number,
        sampling_params=worker.sampling_params,
    )  # fmt: skip
    return megatron_forward_backward(
        model=worker.model, data_iterator=iterator, num_microbatches=number, seq_length=length,
        mbs=size, post_processing_fn=loss, defer_fp32_logits=worker.defer_fp32_logits,
        global_valid_seqs=whole["global_valid_seqs"], global_valid_toks=whole["global_valid_toks"],
        sampling_params=worker.sampling_params, straggler_timer=timer,
        use_fused_linear_logprobs=fused,
    )  # fmt: skip
