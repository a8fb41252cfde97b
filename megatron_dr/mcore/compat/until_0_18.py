"""What megatron-core 0.18 and older have otherwise: see differences.py.

`pretrain` gets a function that builds a chunk of the model, and Megatron's wheel has none: it is
part of the repository's pretrain_gpt.py. Here `GPT` is both that function and, as in the versions
after it, the configuration that the chunks are built from.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_dr.mcore.compat.newest import Hook
from megatron_dr.mcore.refuse import Rule

# of the model's configuration
OF_MODEL = (
    Rule(
        "expert_tensor_parallel_size",
        when=lambda size, config: (
            config.num_moe_experts
            and config.expert_model_parallel_size == 1
            and (size or config.tensor_model_parallel_size) < config.tensor_model_parallel_size
        ),
        says="{who} {flag} {value} without expert parallelism on megatron-core 0.18 and older: "
        "they don't reduce the experts' gradients over tensor-parallel ranks, and the copies "
        "drift apart; use 0.19, or give --expert-model-parallel-size.",
    ),
)
# of the training loop's flags
OF_LOOP = (
    Rule("record_memory_history", says="{flag} has no effect with megatron-core 0.18, which leaves "
         "it to its own script: drop it, or use 0.19."),
    Rule(
        "num_distributed_optimizer_instances",
        when=lambda instances, args: (instances or 1) > 1 and args.use_distributed_optimizer,
        says="{flag} {value} with megatron-core 0.18, whose training loop lays buffers out for one "
        "instance: the gradients of some parameters reach no rank; use 0.19, or set {flag} 1.",
    ),
)  # fmt: skip


@dataclass
class GPT:
    """A GPT model of Megatron's arguments: its configuration, and what builds a chunk of it.

    Attributes:
        transformer: Megatron's TransformerConfig.
        transformer_layer_spec: (transformer's configuration, vp_stage) -> the chunk's layers, in
            place of Megatron's own.
    """

    args: Namespace
    transformer: Any
    rope_scaling_factor: float = 8.0
    transformer_layer_spec: Callable[..., Any] | None = None

    def __call__(
        self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None,
        config: Any = None, pg_collection: Any = None,
    ) -> Any:  # fmt: skip
        """A chunk; called by Megatron's `get_model`."""
        from megatron.core.models.gpt import GPTModel

        args, config = self.args, config or self.transformer
        spec = self.transformer_layer_spec
        layers = spec(config, vp_stage=vp_stage) if spec else _layers(args, config, vp_stage)
        return GPTModel(
            config, layers, vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings, pre_process=pre_process,
            post_process=post_process, fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
            parallel_output=True, rotary_percent=args.rotary_percent, rotary_base=args.rotary_base,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rope_scaling=args.use_rope_scaling, rope_scaling_factor=self.rope_scaling_factor,
            seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
            vp_stage=vp_stage, pg_collection=pg_collection,
        )  # fmt: skip


def _layers(args: Namespace, config: Any, vp_stage: int | None) -> Any:
    """As the repository's gpt_builders.py has it."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
        get_transformer_block_with_experimental_attention_variant_spec as variant_layers,
    )
    from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
        get_gpt_heterogeneous_layer_spec,
    )
    from megatron.core.transformer.spec_utils import import_module as named

    with_te = args.transformer_impl == "transformer_engine"
    if args.spec is not None:
        return named(args.spec)
    if args.experimental_attention_variant is not None:
        return variant_layers(config=config, vp_stage=vp_stage)
    if args.num_experts:
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            config, use_transformer_engine=with_te, normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm, vp_stage=vp_stage,
        )  # fmt: skip
    if args.heterogeneous_layers_config_path is not None:
        return get_gpt_heterogeneous_layer_spec(config, with_te)
    common = (
        config.num_moe_experts, config.moe_grouped_gemm, config.qk_layernorm,
        config.multi_latent_attention, config.experimental_attention_variant,
    )  # fmt: skip
    kitchen = {
        name: getattr(config, name)
        for name in ("use_kitchen", "use_kitchen_attention", "kitchen_attention_backend")
    }
    if with_te:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            *common, qk_l2_norm=config.qk_l2_norm, mla_down_proj_fusion=config.mla_down_proj_fusion,
            use_te_activation_func=config.use_te_activation_func,
            use_grouped_gemm_for_dense_mlp=config.use_grouped_gemm_for_dense_mlp, **kitchen,
        )  # fmt: skip
    return gpt_layer_specs.get_gpt_layer_local_spec(
        *common, normalization=config.normalization, **kitchen
    )


def model_config(args: Namespace) -> GPT:
    from megatron.training.argument_utils import core_transformer_config_from_args

    transformer = core_transformer_config_from_args(args)
    set_yarn(transformer, args)
    return GPT(args, transformer)


def pretrain(
    args: Namespace, model: GPT, datasets: Callable[..., Any], forward_step: Callable[..., Any],
    **options: Any,
) -> None:  # fmt: skip
    from megatron.core.enums import ModelType
    from megatron.training import argument_utils, training

    container = argument_utils.pretrain_cfg_container_from_args(args)
    training.pretrain(
        container, datasets, model, ModelType.encoder_or_decoder, forward_step, **options
    )


def change_model(
    given: tuple[Any, ...], named: dict[str, Any], mend: Callable[[Any], None],
    hooks: Sequence[tuple[str, Hook]],
) -> tuple[Any, ...]:  # fmt: skip
    build, *rest = given
    if isinstance(build, GPT):
        mend(build)
    return (_Changed(build, hooks), *rest) if hooks else given


class _Changed:
    """Builds chunks, and has hooks change them when a rank's last one is made."""

    def __init__(self, build: Callable[..., Any], hooks: Sequence[tuple[str, Hook]]) -> None:
        self.build, self.hooks = build, hooks
        self.chunks: list[Any] = []

    def __call__(self, *rest: Any, vp_stage: int | None = None, **options: Any) -> Any:
        from megatron.training import get_args

        stage = {} if vp_stage is None else {"vp_stage": vp_stage}
        self.chunks.append(self.build(*rest, **stage, **options))
        chunks = get_args().virtual_pipeline_model_parallel_size or 1
        if vp_stage is None or vp_stage + 1 == chunks:
            made, self.chunks = self.chunks, []
            for _, hook in self.hooks:
                hook(made)
            return made[-1]
        return self.chunks[-1]


def batch_on_tp_ranks(batch: dict[str, Any], *, has_cu_seqlens: bool, **options: Any) -> Any:
    from megatron.core.utils import get_batch_on_this_tp_rank

    return get_batch_on_this_tp_rank(batch, is_sft=has_cu_seqlens, **options)


def set_yarn(config: Any, args: Namespace) -> None:
    """As the version after it has it, with the same defaults."""
    if args.position_embedding_type != "yarn" or getattr(args, "multi_latent_attention", False):
        return
    fields = {
        "rotary_scaling_factor": (args.rotary_scaling_factor, 1.0),
        "original_max_position_embeddings": (args.yarn_original_max_position_embeddings, 4096),
        "beta_fast": (args.yarn_beta_fast, 32.0),
        "beta_slow": (args.yarn_beta_slow, 1.0),
        "mscale": (args.mscale, 1.0),
        "mscale_all_dim": (args.mscale_all_dim, 0.0),
        "correction_range_round_to_int": (args.yarn_correction_range_round_to_int, True),
    }
    for name, (value, default) in fields.items():
        if not hasattr(config, f"yarn_{name}"):
            setattr(config, f"yarn_{name}", default if value is None else value)


def open_checkpoints_by(opened: Callable[..., Any]) -> None:
    """See newest.py: each module has a name of its own for what opens files."""
    from megatron.training import checkpointing

    checkpointing.open_file = partial(opened, checkpointing.open_file)
