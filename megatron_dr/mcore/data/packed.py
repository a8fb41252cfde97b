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
from megatron_dr.mcore.refuse import Rule
from megatron_dr.mcore.seams.part import Part

NAMES = ("cu_seqlens", "max_seqlen")


def _size(name: str) -> Rule:
    return Rule(
        name,
        when=lambda size, _: size not in (None, 1),
        says="--dr-pack makes a microbatch of one pack, not of {value}: set {flag} 1 and a larger "
        "--seq-length.",
    )


class PackPart(Part):
    """--dr-pack: several samples in each sequence."""

    flag = "--dr-pack"
    flags = {
        "--dr-pack": {
            "action": "store_true",
            "default": None,
            "help": "put several samples into each sequence, with attention inside each alone; "
            "both roles; a batch then counts packs [flag] (default: off)",
        }
    }
    refused = (
        Rule(
            "context_parallel_size",
            when=lambda size, _: (size or 1) > 1,
            says="--dr-pack with {flag} {value} would cut samples over ranks: drop one of them.",
        ),
        _size("micro_batch_size"),
        _size("eval_micro_batch_size"),
        Rule(
            "transformer_impl",
            when=lambda kind, _: not cpu.is_enabled() and kind != "transformer_engine",
            says="--dr-pack needs attention that tells samples apart, and {flag} {value} has none: "
            "use {flag} transformer_engine.",
        ),
        Rule(
            "dr_target_pass",
            when=lambda how, _: how == "merged",
            says="--dr-pack makes a microbatch of one role's samples: use {flag} own.",
        ),
    )

    def of(self, args: argparse.Namespace) -> bool | None:
        return getattr(args, "dr_pack", None) or None

    def settle(self, own: Any, args: argparse.Namespace) -> None:
        args.create_attention_mask_in_dataloader = False  # cu_seqlens say it

    def kept(self, own: Any, before: argparse.Namespace) -> dict[str, str]:
        return {"dr-pack": "its places in the data count packs, or samples"}

    def known(self, args: argparse.Namespace) -> dict[str, Any]:
        return {"packed": True}


def parameters(batch: dict[str, Any]) -> PackedSeqParams:
    """Of a microbatch of one pack: cu_seqlens [1, L + 1], filled up with L; max_seqlen [1]."""
    filled = batch["cu_seqlens"][0]
    starts = torch.unique_consecutive(filled)
    longest = int(batch["max_seqlen"])
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )  # fmt: skip
