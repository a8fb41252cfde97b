"""The flags of a run, read as the run would read them, as what `megatron_dr/plan` computes with.

Megatron's own parser and checks, for any number of GPUs, without one of them: no process group, no
data, no model.
"""

import argparse
import contextlib
import io
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore import compat, cpu
from megatron_dr.mcore.loop import config_file, needed, parts, script_flags, validation
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args
from megatron_dr.mcore.refuse import Rule, refuse, rules
from megatron_dr.mcore.seams.source import target_microbatches
from megatron_dr.plan.activations import Kept, Recompute, Shape
from megatron_dr.plan.asked import Asked
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model, parameters
from megatron_dr.plan.rows import Rows
from megatron_dr.projection import size_for

WHO = "megatron-dr plan does not know"
_MODEL = dict.fromkeys(
    ("multi_latent_attention", "experimental_attention_variant", "heterogeneous_layers_config_path",
     "heterogeneous_layers_config_encoded_json", "mtp_num_layers", "hybrid_layer_pattern",
     "moe_shared_expert_intermediate_size", "moe_latent_size", "attention_output_gate"),
    "its models are GPTs of equal layers, dense or with routed experts",
)  # fmt: skip
_LAYOUT = dict.fromkeys(
    ("use_megatron_fsdp", "use_torch_fsdp2", "decoder_first_pipeline_num_layers",
     "decoder_last_pipeline_num_layers", "pipeline_model_parallel_layout",
     "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    "it deals layers out evenly, on Megatron's DDP",
)  # fmt: skip
_BYTES = dict.fromkeys(
    ("fp8", "fp4", "use_precision_aware_optimizer", "optimizer_cpu_offload",
     "cpu_offloading", "fine_grained_activation_offloading"),
    "it counts 16- or 32-bit elements on the device",
)  # fmt: skip
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
          "expert_model_parallel_size")  # fmt: skip
_CHUNKS = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
_PARTS = ("lora", "meso", "rl", "value", "dpo")
_KNOWN_MODULES = {"core_attn", "mlp", "moe"}
UNKNOWN = (
    *rules(_MODEL | _LAYOUT | _BYTES),
    Rule("optimizer", when=lambda name, _: name != "adam",
         says="{who} {flag} {value}: only adam's state."),
    Rule("position_embedding_type", when=lambda name, _: name not in ("rope", "none"),
         says="{who} {flag} {value}: only rope, yarn by its flags, and none."),
    Rule("moe_layer_freq", "every layer has experts, or none",
         when=lambda often, args: args.num_experts and often not in (None, 1)),
    Rule("num_distributed_optimizer_instances", when=lambda number, _: number != 1,
         says="{who} {flag} {value}: only one instance."),
    Rule("recompute_modules",
         when=lambda names, args: args.recompute_granularity == "selective"
         and set(names or ()) - _KNOWN_MODULES,
         says="{who} {flag} {value}: only core_attn, mlp and moe."),
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ValueError(f"{message}.")


def read(argv: Sequence[str], gpus: int, one_rank: bool = False) -> Asked:
    """The run of these flags on so many GPUs.

    Args:
        one_rank: the layout is not asked for: Megatron checks that of one rank.

    Raises:
        ValueError: flags that the run would refuse, or that the plan does not know.
    """
    cpu.enable()  # Megatron's checks ask for a device
    args, configs = _validated(list(argv), gpus, one_rank)
    refuse(WHO, UNKNOWN, args)
    on = [part.flag for part, _ in parts.on(args) if part.name in _PARTS]
    if on:
        raise ValueError(f"{WHO} {on[0]}: only training of all weights on samples.")
    dr, target = configs or (None, None)
    if dr is not None and dr.row_kind.in_layers:
        raise ValueError(
            f"{WHO} what --dr-rows sample keeps in the layers: drop it for the plan of buffer rows."
        )
    if dr is not None and dr.targets == "maximin":
        raise ValueError(f"{WHO} --dr-targets maximin: give the plan --dr-targets mean.")
    layout, size = _layout(args), 0
    if dr is not None and target is not None and target.target_data is not None:
        target_microbatches(args, dr, target)  # refuses what can't be divided
        size = target.target_batch
    kept = Kept(
        Shape(args.micro_batch_size, args.seq_length), _recompute(args),
        fused=args.transformer_impl != "local", dropout=args.hidden_dropout > 0,
        rotary=args.position_embedding_type != "none",
    )  # fmt: skip
    model = _model(args)
    wanted = None if dr is None else _wanted(dr, model)
    return Asked(model, layout, kept, args.global_batch_size, size, wanted)


def check(argv: Sequence[str], gpus: int) -> None:
    """Raise ValueError for flags that a run on so many GPUs would refuse before it has data."""
    cpu.enable()
    args, _ = _validated(list(argv), gpus, False)
    with _on_a_gpu(args.dr_device != "cpu"):
        refuse(compat.WHO, needed.RULES, args)


def _validated(
    argv: list[str], gpus: int, one_rank: bool
) -> tuple[Namespace, tuple[DRConfig, TargetConfig] | None]:
    from megatron.training import arguments

    script_flags.refuse_given(argv)
    if cpu.device(argv) == "cpu":
        argv = [*cpu.CPU_FLAGS, *argv]
    parser = _Parser("megatron-dr plan", allow_abbrev=False, add_help=False)
    stock = getattr(arguments.add_megatron_arguments, "__wrapped__", None)
    parser = (stock or arguments.add_megatron_arguments)(parser)
    config_file.apply(add_arguments(parser), argv)
    args = parser.parse_args(argv)
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    args.rank, args.world_size = 0, 1 if one_rank else gpus
    for name in _SIZES if one_rank else ():
        setattr(args, name, 1)
    for name in _CHUNKS if one_rank else ():
        setattr(args, name, None)
    check = getattr(arguments.validate_args, "__wrapped__", arguments.validate_args)
    quiet = contextlib.redirect_stdout(io.StringIO())  # Megatron prints what it derives
    with quiet, _on_a_gpu(args.dr_device != "cpu"):
        configs = configs_from_args(args)
        if configs is not None:
            refuse(compat.WHO, compat.REFUSED, args)
        parts.prepare(args)
        validation.of_megatron(check, args, {})
        parts.settle(args)
    if not one_rank:
        _check_experts(args)
    return args, configs


def _check_experts(args: Namespace) -> None:
    """Megatron refuses this only when it makes its groups (`parallel_state.py`)."""
    sizes = (
        args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        args.expert_model_parallel_size, args.pipeline_model_parallel_size,
    )  # fmt: skip
    if args.world_size % math.prod(sizes):
        raise ValueError(
            f"experts need {math.prod(sizes)} ranks for a copy (--expert-tensor-parallel-size "
            f"{sizes[0]} x --expert-model-parallel-size {sizes[1]} x "
            f"--pipeline-model-parallel-size {sizes[2]}), which do not divide the "
            f"{args.world_size} GPUs: give smaller sizes."
        )


@contextlib.contextmanager
def _on_a_gpu(asked: bool) -> Iterator[None]:
    """Megatron's checks find a GPU that its kernels run on, a Hopper's."""
    cuda: Any = torch.cuda
    stock = cuda.get_device_capability
    if asked:
        cuda.get_device_capability = lambda *_: (9, 0)
    try:
        yield
    finally:
        cuda.get_device_capability = stock


def _model(args: Namespace) -> Model:
    words = args.padded_vocab_size or args.vocab_size
    if not words:
        raise ValueError(
            "the vocabulary's size is not known: give --vocab-size, --padded-vocab-size or "
            "--hf-config."
        )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return Model(
        layers=args.num_layers, hidden=args.hidden_size, heads=args.num_attention_heads,
        groups=groups, ffn=args.ffn_hidden_size, vocabulary=words, head=args.kv_channels,
        tied=not args.untie_embeddings_and_output_weights, gated=args.swiglu,
        biases=args.add_bias_linear, qkv_bias=args.add_qkv_bias,
        norm_bias=args.normalization == "LayerNorm", qk_norm=args.qk_layernorm,
        experts=args.num_experts or 0,
        expert_ffn=(args.moe_ffn_hidden_size or args.ffn_hidden_size) if args.num_experts else 0,
        active=args.moe_router_topk if args.num_experts else 0,
        multiple=1 if args.padded_vocab_size else args.make_vocab_size_divisible_by,
    )  # fmt: skip


def _layout(args: Namespace) -> Layout:
    half = args.fp16 or args.bf16
    fp32 = args.accumulate_allreduce_grads_in_fp32 or not half
    return Layout(
        dp=args.data_parallel_size, tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size, vpp=args.virtual_pipeline_model_parallel_size or 1,
        cp=args.context_parallel_size, ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size or 0, sequence_parallel=args.sequence_parallel,
        distributed_optimizer=args.use_distributed_optimizer, overlap=args.overlap_grad_reduce,
        overlap_gather=args.overlap_param_gather, weight_bytes=2 if half else 4,
        gradient_bytes=4 if fp32 else 2, bucket=args.ddp_bucket_size or 0,
    )  # fmt: skip


def _recompute(args: Namespace) -> Recompute:
    if args.recompute_granularity is None:
        return Recompute()
    return Recompute(
        args.recompute_granularity, tuple(args.recompute_modules or ("core_attn",)),
        args.recompute_num_layers or 1, args.recompute_method == "block",
        bool(args.distribute_saved_activations),
    )  # fmt: skip


def _wanted(dr: DRConfig, model: Model) -> Wanted:
    if dr.row_kind.named:
        raise ValueError(f"{WHO} --dr-rows domain, whose corpora the data name: give --dr-slots.")
    outside = 2 if model.tied else 3  # embedding, last norm, output layer
    blocks = {
        "model": 1, "layer": model.layers + outside,
        "matrix": len(parameters(model, Layout(), 0)[0]),
    }  # fmt: skip
    rows = Rows(
        slots=dr.num_slots, target_ranks=dr.target_ranks, halves=dr.alpha_style == "auto",
        exact=dr.gram != "sketch", slot_bytes=2 if dr.slot_dtype == "bf16" else 4,
        blocks=blocks[dr.blocks],
    )  # fmt: skip
    return Wanted(
        rows, auto=dr.row_kind.at_attach, weighs=dr.weighs_rows,
        groups_ranks="row_ranks" in dr.row_kind.dials, row_ranks=dr.row_ranks, memory=dr.memory,
        gram=dr.gram,
        sketch_size=lambda vectors: dr.sketch_size or size_for(dr.wanted_error, vectors),
    )  # fmt: skip
