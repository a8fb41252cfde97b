"""The forward step of running text and samples, packed too, and what Megatron watches of a step."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.utils import StragglerDetector

ForwardStep = Callable[..., tuple[Any, Callable[..., Any]]]

_SPIKE = 10  # times the largest loss so far, as in Megatron's pretrain_gpt.py
_TIMER = StragglerDetector()  # one for all; made anew, it would forget what Megatron told it


def watched(forward_step: ForwardStep) -> ForwardStep:
    """A forward step of ours with the checks of the loss, which Megatron leaves to the script.

    A loss that is NaN or infinite (not with --no-check-for-nan-in-loss-and-grad), or one that jumps
    (--check-for-spiky-loss), is told to Megatron's rerun state machine: it ends the run, notes it,
    or with --rerun-mode runs the step again.
    """

    @wraps(forward_step)
    def step(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss_func = forward_step(data_iterator, model)

        def loss(output: torch.Tensor) -> Any:
            found = loss_func(output)
            _check(found[0].detach())
            return found

        return output, loss

    return step


def timed(forward_step: ForwardStep) -> ForwardStep:
    """A forward step of ours whose time counts for --log-straggler."""

    def step(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        with _TIMER:
            return forward_step(data_iterator, model)

    return step


def _check(loss: torch.Tensor) -> None:
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    args, machine = get_args(), get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for kind, is_wrong in (("NaN", torch.isnan), ("infinite", torch.isinf)):
            machine.validate_result(loss, is_wrong, f"the loss of a microbatch is {kind}")
    if args.check_for_spiky_loss:
        large = partial(machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        machine.validate_result(loss, large, "the loss of a microbatch jumps", fatal=False)


@watched
def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One microbatch's forward: output of this stage, and the loss function."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with _TIMER(bdata=True):
        batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), model.training)
    timers("batch-generator").stop()
    with _TIMER:
        output = model(
            batch["tokens"], batch["position_ids"], batch["attention_mask"],
            labels=batch["labels"], packed_seq_params=batch.get("packed_seq_params"),
        )  # fmt: skip
    return output, partial(loss_func, batch["loss_mask"])


def _batch(data_iterator: Any, vp_stage: int | None, training: bool) -> dict[str, Any]:
    """The microbatch on this rank: read on tensor-parallel rank 0, split over context ranks."""
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

    from megatron_dr.mcore import compat
    from megatron_dr.mcore.data import packed

    args = get_args()
    packs = bool(getattr(args, "dr_pack", None))
    names = ["tokens", "labels", "loss_mask", "position_ids", "attention_mask"]
    names += packed.NAMES if packs else ()
    if not packs and not is_first_or_last_pipeline_stage(vp_stage):
        return dict.fromkeys(names)
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        batch = {n: data[n].cuda(non_blocking=True) if n in data else None for n in names}
    batch = compat.batch_on_tp_ranks(
        batch, has_cu_seqlens=packs, is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(), cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if training else args.eval_micro_batch_size,
        seq_length=args.seq_length, mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )  # fmt: skip
    if packs:
        return {**batch, "packed_seq_params": packed.parameters(batch)}
    cut: dict[str, Any] = compat.batch_on_cp_ranks(batch, mpu.get_context_parallel_group())
    return cut


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked tokens' losses, their number, and both for the log."""
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
