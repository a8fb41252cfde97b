"""Megatron's own training loop with the plugin: `torchrun ... -m megatron_dr.train <flags>`.

The model is Megatron's GPT model built from its flags, the loop is `megatron.training.pretrain`:
checkpoints, logging, validation, schedules and flags are Megatron's.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dr.hf import assets
from megatron_dr.mcore import cpu


def main(store: torch.distributed.Store | None = None) -> None:  # type: ignore[name-defined]
    """The entry; flags from the command line.

    Args:
        store: where ranks meet, instead of torchrun's.
    """
    warnings.filterwarnings("ignore", module="megatron")
    cpu.enable_if_asked()  # before Megatron is imported
    _run(store)


def import_megatron() -> None:
    """Import what a run needs, so that forks of this process don't: after `cpu.enable()`."""
    import megatron.training  # noqa: F401
    import megatron.training.models.gpt  # noqa: F401

    import megatron_dr.mcore.data.source  # noqa: F401
    import megatron_dr.mcore.dpo.source  # noqa: F401
    import megatron_dr.mcore.rl.source  # noqa: F401
    from megatron_dr.mcore.loop import adaptor  # noqa: F401


def _run(store: torch.distributed.Store | None) -> None:  # type: ignore[name-defined]
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, pretrain, training
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dr.mcore.loop import adaptor, first_line

    adaptor.enable()
    training.training_log = partial(first_line.log, training.training_log)
    defaults = {"tokenizer_type": "GPT2BPETokenizer", "eval_interval": 1000}
    args = parse_and_validate_args(args_defaults=defaults)
    _carry_assets(args)
    model = argument_utils.gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor  # Megatron 0.19 leaves it at 8
    if cpu.is_enabled():
        from megatron_dr.mcore.cpu.layers import layer_spec

        model.transformer_layer_spec = layer_spec
        # gloo may still be sending a stage's output when Megatron frees it
        model.transformer.deallocate_pipeline_outputs = False
    pretrain(
        argument_utils.pretrain_cfg_container_from_args(args, model), datasets_provider,
        ModelType.encoder_or_decoder, forward_step, store=store,
        get_embedding_ranks=partial(_embedding_ranks, not args.untie_embeddings_and_output_weights),
    )  # fmt: skip
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _carry_assets(args: Any) -> None:
    """Give --save the Hugging Face configuration and tokenizer of what is loaded, on rank 0."""
    if args.save and int(os.environ.get("RANK", "0")) == 0:
        for loaded in filter(None, (args.load, args.pretrained_checkpoint)):
            assets.carry(Path(loaded), Path(args.save))


def _embedding_ranks(tied: bool, pp_ranks: list[int]) -> list[int]:
    """Stages that hold the embedding: the first, and the last where the output layer is tied."""
    return sorted({pp_ranks[0], pp_ranks[-1]}) if tied else [pp_ranks[0]]


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    """General train, validation and test sets; called by Megatron on every rank."""
    from megatron.training import get_args, get_tokenizer

    from megatron_dr.mcore import errors
    from megatron_dr.mcore.data import datasets, vocabulary
    from megatron_dr.mcore.loop import adaptor

    built: tuple[Any, Any, Any] = (None, None, None)
    with errors.refused():
        vocabulary.check(get_args(), get_tokenizer())
        run = adaptor.current_run()
        if run is not None:
            built = run.source.datasets(num_samples, vp_stage)
        else:
            built = datasets.general_datasets(get_args(), num_samples, vp_stage)
    return built


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    """One microbatch's forward: output of this stage, and the loss function."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_timers

    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"), model.training)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"],
        packed_seq_params=batch.get("packed_seq_params"),
    )  # fmt: skip
    return output, partial(loss_func, batch["loss_mask"])


def _batch(data_iterator: Any, vp_stage: int | None, training: bool) -> dict[str, Any]:
    """The microbatch on this rank: read on tensor-parallel rank 0, split over context ranks."""
    from megatron.core import mpu
    from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
    from megatron.training import get_args
    from megatron.training.utils import is_first_or_last_pipeline_stage

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
    batch = get_batch_on_this_tp_rank(
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
    group = mpu.get_context_parallel_group()
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return batch


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked tokens' losses, their number, and both for the log."""
    mask = loss_mask.reshape(-1).float()
    loss = (output.reshape(-1).float() * mask).sum()
    tokens = mask.sum().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}
