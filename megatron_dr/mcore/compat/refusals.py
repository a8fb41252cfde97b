"""Megatron's options that the plugin refuses wherever it is attached, each with the reason."""

from importlib.util import find_spec
from typing import Any

from megatron_dr.mcore.compat import until_0_18
from megatron_dr.mcore.compat.versions import INSTALLED
from megatron_dr.mcore.refuse import Rule, rules, single

# Configuration that no test of ours covers: refused at attach, with what to change.
WHO = "megatron_dr does not support"
MODEL = rules({
    "overlap_moe_expert_parallel_comm": "its combined schedule runs two microbatches at once",
    "defer_embedding_wgrad_compute": "it computes weight gradients after the microbatch",
    "delay_wgrad_compute": "it computes weight gradients after the microbatch",
    "overlap_dispatch_backward_with_experts_wgrad": "it computes experts' weight gradients apart "
    "from their backward",
    "hybrid_context_parallel": "its schedule regroups ranks in every microbatch",
    "mtp_num_layers": "multi-token prediction ties the embedding on more than two stages",
    "moe_paged_stash": "it reruns steps",
    "num_microbatches_with_partial_activation_checkpoints": "it asks more of a forward step than "
    "ours takes",
    "moe_single_grouped_weight": "its experts share one parameter",
    "moe_single_grouped_bias": "its experts share one parameter",
    "moe_use_grouped_tensor": "its experts' gradients are a tensor of another kind",
    "enable_mhc_connections": "stages send residual streams of another width",
    "flextron": "its routers are reduced over pipeline stages",
})  # fmt: skip
DDP = rules({
    "use_megatron_fsdp": "Megatron-FSDP keeps gradients in its own sharded buffers",
    "use_custom_fsdp": "it is Megatron-FSDP, which keeps gradients in its own sharded buffers",
    "reuse_grad_buf_for_mxfp8_param_ag": "parameters and gradients share a buffer",
    "param_name_patterns_for_fp32_local_accumulation": "it keeps gradients beside the buffers",
})  # fmt: skip
_FLAGS = rules({
    "use_torch_fsdp2": "torch FSDP2 reduces gradients by itself",
    "sft": "JSONL with 'prompt' and 'response' goes to --data-path as it is, and --dr-pack packs "
    "both roles' samples",
    "fim_data": "the target's text would not be filled in",
    "dataloader_inter_document_masking": "the target's documents would see one another",
    "logits_load_dir": "the target's tokens have no teacher's logits",
    "logits_save_dir": "the target's logits would be saved among the general ones",
    "inprocess_restart": "it starts a run again in a process that has the plugin's state",
})  # fmt: skip
_BATCHES = tuple(
    Rule(
        name,
        when=lambda value, args: value and not _rows_of_ranks(args),
        says="{who} {flag} but with rows of ranks: other rows need the same number of "
        "microbatches in every step; give --dr-rows rank, or drop it.",
    )
    for name in ("rampup_batch_size", "step_batch_size_schedule")
)
EINOPS = Rule(
    "num_distributed_optimizer_instances",
    when=lambda instances, _: (instances or 1) > 1 and find_spec("einops") is None,
    says="{flag} {value} needs the package einops, by which Megatron makes its groups: install it.",
)
SINGLE = tuple(map(single, ("gtp_weight_remat_size", "expert_gtp_weight_remat_size")))
GRAPHS = Rule(
    "cuda_graph_impl",
    when=lambda kind, _: kind not in (None, "none"),
    says="{who} CUDA graphs: drop {flag}.",
)
_WIRE = tuple(
    Rule(
        name,
        when=lambda kind, _: kind not in (None, "bf16"),
        says="{who} {flag} {value}: experts' tokens would be rounded on their way, the target's "
        "too; drop it.",
    )
    for name in ("moe_dispatch_fwd_dtype", "moe_combine_bwd_dtype")
)
_OLD = INSTALLED <= (0, 18)
OF_MODEL = (*MODEL, *SINGLE, *_WIRE, GRAPHS, *(until_0_18.OF_MODEL if _OLD else ()))
OF_DDP = (*DDP, *SINGLE)
# of the flags of an older version's training loop, with the plugin or without
OF_LOOP = until_0_18.OF_LOOP if _OLD else ()
# of Megatron's flags: before it builds anything
REFUSED = (*MODEL, *DDP, *_WIRE, *_FLAGS, *_BATCHES, EINOPS, *SINGLE)


def _rows_of_ranks(args: Any) -> bool:
    rows = getattr(args, "dr_rows", None) or ("slot" if args.dr_slots else "auto")
    return rows in ("auto", "rank")
