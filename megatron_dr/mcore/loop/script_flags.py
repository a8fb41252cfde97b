"""Megatron's flags that `megatron_dr.train` does not act on: given, they are refused.

Most flags are read by Megatron's library, whatever script calls it. The others are for a script to
act on, as pretrain_gpt.py does; this entry acts on those about its data, its forward step and its
loss, and refuses the rest by name. `mcore/compat/flags.txt` says of every flag which it is.
"""

import fnmatch
from collections.abc import Iterable
from typing import Any

from megatron_dr.mcore import cpu
from megatron_dr.mcore.refuse import Rule, refuse, rules

WHO = "megatron_dr.train does not act on"

# Patterns of flags, each with the reason.
REFUSED = {
    "it does not fill in middles: prepare such data as an indexed dataset, for --data-path": """
        --fim-*""",
    "documents of running text see one another in a sequence; --dr-pack keeps samples apart": """
        --dataloader-inter-document-masking""",
    "it has no teacher's logits for the target's tokens": "--logits-load-*",
    "Megatron would start again in the process of the run that failed, with the plugin's state": """
        --inprocess-*""",
    "it is of Megatron's train_rl.py; here --dr-rl-algorithm trains by rewards": """
        --perform-rl-step --rl-* --no-rl-* --grpo-* --langrl-env-config --refit-method""",
    "JSONL with 'prompt' and 'response' goes to --data-path as it is, and --dr-pack packs": "--sft",
    "Megatron reads it in place of the command line, the --dr-* flags too": "--yaml-cfg",
    "its forward step knows one head": "--mtp-*",
    "its forward step has no combined schedule": "--overlap-moe-expert-parallel-comm",
    "its batches are not regrouped over ranks": """
        --hybrid-context-parallel --max-seqlen-per-dp-cp-rank""",
    "it is of Megatron's pretrain_hybrid.py": """
        --hybrid-layer-pattern --hybrid-override-pattern --is-hybrid-model --mamba-*
        --disable-mamba-mem-eff-path""",
    "it is of Megatron's scripts for images": """
        --vision-* --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction
        --data-per-class-fraction --head-lr-mult --swin-backbone-type --mask-type --mask-factor
        --iter-per-epoch --dino-*""",
    "it is of Megatron's scripts for BERT and retrieval": """
        --mask-prob --short-seq-prob --bert-* --output-bert-embeddings --ict-* --biencoder-*
        --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --retriever-* --block-data-path --embedding-path --indexer-* --vocab-extra-ids""",
    "it is of Megatron's inference": """
        --inference-* --no-inference-* --decode-only-cuda-graphs --enable-chunked-prefill
        --num-speculative-tokens --max-tokens-to-oom --use-legacy-static-engine
        --nccl-all-reduce-for-prefill --moe-pad-experts-for-cuda-graph-inference
        --use-same-sampling-seed-across-dp-ranks""",
    "nothing in Megatron reads it": """
        --apply-residual-connection-post-layernorm --openai-gelu --onnx-safe
        --exit-signal-handler-for-dataloader --dist-ckpt-save-pre-mcore-014
        --enable-full-sharding-in-hsdp --sample-rate""",
    "Megatron no longer takes it: give --micro-batch-size": "--batch-size",
    "Megatron no longer takes it: give --lr-warmup-fraction": "--warmup",
    "Megatron no longer takes it: give --tensor-model-parallel-size": "--model-parallel-size",
    "Megatron no longer takes it: give --recompute-granularity": "--checkpoint-activations",
}

_ROTARY = ("rope", "yarn", "none")
_ATTENTION = (
    Rule(
        "reset_attention_mask",
        when=lambda given, args: given and (
            cpu.is_enabled() or args.transformer_impl != "local"
            or not args.create_attention_mask_in_dataloader
        ),
        says="{who} {flag}: attention that reads no mask but the causal one would ignore it; use "
        "--transformer-impl local and masks from the data loader on a GPU, or drop it.",
    ),
    Rule(
        "reset_position_ids",
        when=lambda given, args: given and args.position_embedding_type in _ROTARY,
        says="{who} {flag}: --position-embedding-type {options.position_embedding_type} does not "
        "read position ids; drop it.",
    ),
)  # fmt: skip
_CPU = (
    *rules(dict.fromkeys(
        ("multi_latent_attention", "experimental_attention_variant", "spec", "qk_l2_norm",
         "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json",
         "window_size"),
        "the layers of --dr-device cpu are without",
    )),
    Rule("log_straggler", "it reads the clock and the temperature of a GPU"),
    Rule(
        "softmax_type", "attention of --dr-device cpu is without",
        when=lambda kind, _: kind not in (None, "vanilla"),
    ),
    Rule(
        "moe_layer_freq", "with --dr-device cpu every layer has experts",
        when=lambda often, args: args.num_experts and often not in (None, 1),
    ),
)  # fmt: skip


def refuse_given(argv: Iterable[str]) -> None:
    """Raise ValueError for the first flag of a command line that would have no effect."""
    for flag in (argument.partition("=")[0] for argument in argv):
        why = reason(flag)
        if why is not None:
            raise ValueError(f"{WHO} {flag} ({why}): drop it.")


def reason(flag: str) -> str | None:
    """Why a flag is refused; None where it is not."""
    if not flag.startswith("--"):
        return None
    for why, patterns in REFUSED.items():
        if any(fnmatch.fnmatchcase(flag, pattern) for pattern in patterns.split()):
            return why
    return None


def refuse_values(args: Any) -> None:
    """As `refuse_given`, of what depends on other flags; after Megatron's own checks."""
    refuse(WHO, (*_ATTENTION, *(_CPU if cpu.is_enabled() else ())), args)
