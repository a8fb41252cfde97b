"""Megatron-Core's model, DDP, optimizer and schedules at small size, in a layout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dr.mcore import compat
from megatron_dr.mcore.cpu.layers import layer_spec
from megatron_dr.mcore.ownership import owned_parameters
from megatron_dr.mcore.step.sets import TargetSets

from . import _data
from ._data import Layout

LEARNING_RATE, CLIP, EPS = 1e-2, 1.0, 1e-5


class _FusedWeightGradient:
    """apex's CUDA kernel in plain torch: it adds the weight gradient into main_grad itself."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Any, grad_output: Any, main_grad: torch.Tensor) -> None:
        main_grad.add_(grad_output.T @ inputs)


def transformer_config(layout: Layout) -> TransformerConfig:
    gated = not layout.layer_norm
    return TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="LayerNorm" if layout.layer_norm else "RMSNorm",
        gated_linear_unit=gated,
        activation_func=torch.nn.functional.silu if gated else torch.nn.functional.gelu,
        add_bias_linear=layout.layer_norm,
        qk_layernorm=layout.qk_layernorm,
        hidden_dropout=layout.dropout,
        attention_dropout=layout.dropout,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp if layout.moe else layout.tp,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=layout.per_token,
        num_moe_experts=4 if layout.moe else None,
        moe_ffn_hidden_size=24 if layout.moe else None,
        moe_router_topk=2,
        moe_aux_loss_coeff=0.0,
        moe_token_dispatcher_type="alltoall",
        # gloo gathers only equal shares: room for every token in every expert, none dropped
        moe_expert_capacity_factor=2.0 if layout.etp > 1 else None,
        moe_pad_expert_input_to_capacity=layout.etp > 1,
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
        bf16=layout.bf16,
        params_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if layout.bf16 else torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=layout.fused_gradients,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        deallocate_pipeline_outputs=False,
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=layout.vpp is None,
    )


def initialize(layout: Layout) -> None:
    if layout.fused_gradients:
        layers._grad_accum_fusion_available = True
        layers.fused_weight_gradient_mlp_cuda = _FusedWeightGradient
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp if layout.moe else layout.tp,
        num_distributed_optimizer_instances=layout.instances,
    )
    model_parallel_cuda_manual_seed(1)


def build(
    layout: Layout, initial: dict[str, torch.Tensor] | None = None
) -> tuple[list[Any], Any, TransformerConfig]:
    """Model chunks, optimizer and configuration; parameters are those of `initial` by name."""
    config = transformer_config(layout)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=not layout.bf16_buffers,
        average_in_collective=layout.average,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap_param_gather,
        use_distributed_optimizer=layout.distributed_optimizer,
        num_distributed_optimizer_instances=layout.instances,
        check_for_nan_in_grad=False,
        bucket_size=5000 if layout.overlap else None,
    )
    model = []
    for stage in range(layout.vpp or 1):
        vp = {"vp_stage": stage} if layout.vpp else {}
        chunk = GPTModel(
            config,
            layer_spec(config, **vp),
            vocab_size=64,
            max_sequence_length=_data.LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not vp, **vp),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not vp, **vp),
            position_embedding_type="rope",
            rotary_percent=1.0,
            share_embeddings_and_output_weights=layout.tied,
            **vp,
        )
        chunk.model_type = ModelType.encoder_or_decoder
        model.append(chunk.bfloat16() if layout.bf16 else chunk)
    if initial is not None:
        load(model, config, initial)
    for owned in owned_parameters(model, config):
        owned.parameter.requires_grad_(layout.trains(owned.name))
    ddp = [DistributedDataParallel(config, ddp_config, chunk) for chunk in model]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=LEARNING_RATE,
            min_lr=LEARNING_RATE,
            weight_decay=0.0,
            adam_eps=EPS,
            clip_grad=CLIP,
            bf16=layout.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
            overlap_param_gather=layout.overlap_param_gather,
        ),
        ddp,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if layout.overlap:
        no_sync = [chunk.no_sync for chunk in ddp]
        config.no_sync_func = no_sync if layout.vpp else no_sync[0]
    return ddp, optimizer, config


@torch.no_grad()
def load(model: list[Any], config: TransformerConfig, initial: dict[str, torch.Tensor]) -> None:
    """Each rank takes its elements of the whole model's parameters."""
    for owned in owned_parameters(model, config):
        index = owned.global_index(0, owned.parameter.numel())
        values = initial[owned.name].reshape(-1)[index]
        owned.parameter.copy_(values.view_as(owned.parameter))


def pieces(model: list[Any], config: TransformerConfig, attribute: str = "data") -> list[Any]:
    """(name, global numel, index, values) of every local parameter, to be put together."""
    out = []
    for o in owned_parameters(model, config):
        values = getattr(o.parameter, attribute).detach().float().reshape(-1)
        out.append((o.name, o.global_numel, o.global_index(0, o.parameter.numel()), values))
    return out


def whole(per_rank: list[list[Any]]) -> dict[str, torch.Tensor]:
    """Flat parameters of the whole model; copies on several ranks must agree."""
    out: dict[str, torch.Tensor] = {}
    for rank in per_rank:
        for name, numel, index, values in rank:
            flat = out.setdefault(name, torch.full((numel,), float("nan")))
            known = ~torch.isnan(flat[index])
            torch.testing.assert_close(flat[index][known], values[known], rtol=1e-4, atol=2e-6)
            flat[index] = values
    assert not any(torch.isnan(v).any() for v in out.values())
    return out


def loss_func(mask: torch.Tensor, output: torch.Tensor) -> tuple[Any, ...]:
    """As in Megatron's pretrain_gpt: (sum, number of tokens, report)."""
    mask = mask.reshape(-1).float()
    loss = (output.float().reshape(-1) * mask).sum()
    tokens = mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def logged(reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """A step's `dr ...` values as Megatron's loop reads them: pairs (sum, count) by microbatch."""
    names = [name for name in (reports[0] if reports else {}) if name.startswith("dr ")]
    pairs = {name: sum(report[name] for report in reports) for name in names}
    return {name: float(total / count) for name, (total, count) in pairs.items()}


def forward_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = {k: v[None] for k, v in next(data_iterator).items()}
    batch["attention_mask"] = None
    group = parallel_state.get_context_parallel_group()
    batch = compat.batch_on_cp_ranks(batch, group)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"])


def schedule(layout: Layout, model: list[Any], batches: list[Any]) -> dict[str, Any]:
    iterators = [iter(batches) for _ in model]
    return {
        "forward_step_func": forward_step,
        "data_iterator": iterators if layout.vpp else iterators[0],
        "model": model if layout.vpp else model[0],
        "num_microbatches": len(batches),
        "seq_length": _data.LENGTH,
        "micro_batch_size": 1,
        "forward_only": False,
    }


def target_sets(layout: Layout, number: int) -> TargetSets | None:
    """Of so many target microbatches of a rank."""
    if not layout.target_sets or not number:
        return None
    of = layout.target_sets * (number // len(layout.target_sets))
    weights = (0.5, 0.5) if layout.maximin else _data.SET_WEIGHTS
    return TargetSets(("first", "second"), weights, of)


def train(
    layout: Layout,
    steps: int,
    initial: dict[str, torch.Tensor] | None = None,
    plugin: Callable[..., Any] | None = None,
) -> tuple[list[Any], Any, TransformerConfig, list[Any]]:
    """`steps` training steps; `plugin(model, optimizer, config)` returns a handle, or None."""
    initialize(layout)
    model, optimizer, config = build(layout, initial)
    handle = plugin(model, optimizer, config) if plugin else None
    dp_rank, log = parallel_state.get_data_parallel_rank(), []
    function = get_forward_backward_func()
    for step in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        kwargs = schedule(layout, model, _data.general(layout, step, dp_rank))
        if handle is None:
            reports = function(**kwargs)
        else:
            batches = _data.target(layout, step, dp_rank) if layout.targets else []
            target = [iter(batches) for _ in model]
            reports = handle.step(
                function,
                target_data_iterator=target if layout.vpp else target[0],
                num_target_microbatches=layout.num_target if layout.targets else 0,
                domains=_data.domains(layout, dp_rank) if layout.domains else (),
                target_sets=target_sets(layout, layout.num_target),
                **kwargs,
            )
        log.append((reports, handle.rows.update if handle else None))
        optimizer.step()
    if layout.overlap_param_gather:
        for chunk in model:
            chunk.disable_forward_pre_hook()  # waits for the parameters
    return model, optimizer, config, log
