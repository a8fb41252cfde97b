"""Packs of samples in a forward step: Megatron's own parameters of packed sequences.

Attention, rotary positions and their pipelines are Megatron's "thd" path: Transformer Engine's on
a GPU, `cpu_layers.Attention` without it. Every stage reads the packs, as with Megatron's own
packed data.
"""

import argparse
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_dr.mcore import cpu

NAMES = ("cu_seqlens", "max_seqlen")


def check(args: argparse.Namespace) -> None:
    """Settle the flags that packs ask for.

    Raises:
        ValueError: flags with which samples can't be packed.
    """
    if not args.dr_pack:
        return
    if args.context_parallel_size > 1:
        raise ValueError(
            "--dr-pack with --context-parallel-size "
            f"{args.context_parallel_size} would cut samples over ranks: drop one of them."
        )
    for flag in ("micro_batch_size", "eval_micro_batch_size"):
        size = getattr(args, flag, None)
        if size not in (None, 1):
            raise ValueError(
                f"--dr-pack makes a microbatch of one pack, not of {size}: set "
                f"--{flag.replace('_', '-')} 1 and a larger --seq-length."
            )
    if not cpu.is_enabled() and args.transformer_impl != "transformer_engine":
        raise ValueError(
            f"--dr-pack needs attention that tells samples apart, and --transformer-impl "
            f"{args.transformer_impl} has none: use --transformer-impl transformer_engine."
        )
    if args.dr_target_pass == "merged":
        raise ValueError(
            "--dr-pack makes a microbatch of one role's samples: use --dr-target-pass own."
        )
    args.create_attention_mask_in_dataloader = False  # cu_seqlens say it


def parameters(batch: dict[str, Any]) -> PackedSeqParams:
    """Of a microbatch of one pack: cu_seqlens [1, L + 1], filled up with L; max_seqlen [1]."""
    filled = batch["cu_seqlens"][0]
    starts = torch.unique_consecutive(filled)
    longest = int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
