"""slime's training loop: its own where slime is installed, else one in its order of calls."""

import importlib
import sys
import types
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from . import _data, _megatron

PACKAGE = "slime.backends.megatron_utils"


def arguments(hook: str) -> Namespace:
    """Megatron's and slime's arguments that the loop reads."""
    from megatron.training.global_vars import set_args

    zero = ["reset_optimizer_states", "manual_gc", "overlap_grad_reduce", "overlap_param_gather",
            "enable_mtp_training", "ci_test", "allgather_cp", "calculate_per_token_loss",
            "recompute_loss_function", "use_wandb", "use_tensorboard"]  # fmt: skip
    none = ["save_debug_train_data", "ci_save_grad_norm", "ci_load_grad_norm", "decoder_seq_length"]
    args = Namespace(
        custom_megatron_before_train_step_hook_path=hook, loss_type="sft_loss", rollout_top_p=1.0,
        rollout_temperature=1.0, data_pad_size_multiplier=1, seq_length=_data.LENGTH + 1,
        micro_batch_size=1, use_distributed_optimizer=True, check_for_nan_in_loss_and_grad=True,
        log_probs_chunk_size=-1, **dict.fromkeys(zero, False), **dict.fromkeys(none),
    )  # fmt: skip
    set_args(args)
    return args


def rollout(steps: list[list[dict[str, torch.Tensor]]]) -> dict[str, list[Any]]:
    """slime's rollout data of this rank: one sample in a microbatch, in one or more steps."""
    batches = [batch for step in steps for batch in step]
    ranks = parallel_state.get_data_parallel_world_size()
    return {
        "tokens": [torch.cat([b["tokens"], b["labels"][-1:]]) for b in batches],
        "total_lengths": [_data.LENGTH + 1] * len(batches),
        "response_lengths": [_data.LENGTH] * len(batches),
        "loss_masks": [b["loss_mask"] for b in batches],
        "micro_batch_indices": [[n] for n in range(len(batches))],
        "num_microbatches": [len(step) for step in steps],
        "global_batch_sizes": [len(step) * ranks for step in steps],
    }


def dense(model: list[Any]) -> None:
    """One sequence in a pack is a dense one: the local attention of these tests knows no packs."""
    for chunk in model:
        stock = chunk.module.forward

        def forward(packed_seq_params: Any = None, stock: Any = stock, **inputs: Any) -> Any:
            return stock(**inputs)

        chunk.module.forward = forward


def scheduler(optimizer: Any) -> OptimizerParamScheduler:
    rate = _megatron.LEARNING_RATE
    return OptimizerParamScheduler(
        optimizer, init_lr=rate, max_lr=rate, min_lr=rate, lr_warmup_steps=0, lr_decay_steps=1000,
        lr_decay_style="constant", start_wd=0.0, end_wd=0.0, wd_incr_steps=1000,
        wd_incr_style="constant",
    )  # fmt: skip


def on_cpu() -> None:
    """slime's own place for data: it wants a device with a number."""
    accelerator = importlib.import_module("slime.utils.accelerator")
    for name in ("device", "current_device"):
        setattr(accelerator, name, lambda index=None: torch.device("cpu"))


def stand_in() -> None:
    """Modules of slime's names, whose functions do what slime's do, in its order."""
    model = types.ModuleType(PACKAGE + ".model")
    data = types.ModuleType(PACKAGE + ".data")
    model.train, model.train_one_step = train, train_one_step  # type: ignore[attr-defined]
    data.get_data_iterator = get_data_iterator  # type: ignore[attr-defined]
    for name in ("slime", "slime.backends", PACKAGE):
        sys.modules[name] = types.ModuleType(name)
    sys.modules[model.__name__], sys.modules[data.__name__] = model, data


class _Samples:
    """Not an iterator: slime's is asked for named lists."""

    def __init__(self, data: dict[str, list[Any]]) -> None:
        self.data, self.offset = data, 0

    def get_next(self, keys: list[str]) -> dict[str, list[Any]]:
        self.offset += 1
        chosen = self.data["micro_batch_indices"][self.offset - 1]
        return {key: [self.data[key][n] for n in chosen] for key in keys}


def get_data_iterator(data: dict[str, list[Any]]) -> list[_Samples]:
    return [_Samples(data)]


def train(
    rollout_id: int, model: Any, optimizer: Any, scheduler: Any, data_iterator: Any,
    num_microbatches: list[int], global_batch_sizes: list[int],
) -> None:  # fmt: skip
    """The finalize hook is set in each rollout."""
    from megatron.training.global_vars import get_args

    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    for step_id, (number, size) in enumerate(
        zip(num_microbatches, global_batch_sizes, strict=True)
    ):
        train_one_step(get_args(), rollout_id, step_id, data_iterator, model, optimizer, scheduler,
                       number, size)  # fmt: skip


def train_one_step(
    args: Namespace, rollout_id: int, step_id: int, data_iterator: Any, model: Any, optimizer: Any,
    scheduler: Any, num_microbatches: int, step_global_batch_size: int,
) -> None:  # fmt: skip
    """Gradients are zeroed, then the hook is called; the loss brings 1 for its count of tokens."""
    _zero(model, optimizer)
    path, _, name = args.custom_megatron_before_train_step_hook_path.rpartition(".")
    hook = getattr(importlib.import_module(path), name)
    hook(args, rollout_id, step_id, model, optimizer, scheduler)
    ranks = parallel_state.get_data_parallel_world_size()

    def loss_func(batch: Any, logits: torch.Tensor) -> Any:
        tokens, mask = batch["tokens"][0], batch["loss_masks"][0]
        found = logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        mean = -(found * mask).sum() / mask.sum()
        loss = mean * num_microbatches / step_global_batch_size * ranks
        return loss, torch.tensor(1), {"keys": ["loss"], "values": torch.stack([mean.detach()])}

    def forward_step(data: _Samples, chunk: Any) -> Any:
        batch = data.get_next(["tokens", "loss_masks"])
        logits = chunk(input_ids=batch["tokens"][0][None], position_ids=None, attention_mask=None)
        return logits, partial(loss_func, batch)

    reports = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=data_iterator, model=model,
        num_microbatches=num_microbatches, seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size, decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
    )  # fmt: skip
    assert [set(r) for r in reports] == [{"keys", "values"}] * num_microbatches
    assert optimizer.step()[0]
    scheduler.step(increment=step_global_batch_size)
    _zero(model, optimizer)


def _zero(model: Any, optimizer: Any) -> None:
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
