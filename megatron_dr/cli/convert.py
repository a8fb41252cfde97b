"""Convert checkpoints between Hugging Face and Megatron, on the CPU; docs/convert.md.

    megatron-dr convert hf-to-mcore HF_DIR OUT [--tp T] [--pp P] [--ep E] [--dtype bf16]
    megatron-dr convert mcore-to-hf CKPT OUT [--dtype bf16]
    megatron-dr convert mcore-to-hf CKPT OUT --adapter      # LoRA's adapters alone, for PEFT

Both also run by `torchrun --nproc-per-node N -m megatron_dr convert ...`: each process writes its
own files.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_dr.cli import ranks
from megatron_dr.cli.main import parser_of
from megatron_dr.hf import adapters, assets, from_megatron, to_megatron
from megatron_dr.hf.output import agreed, rank
from megatron_dr.hf.source import has_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("hf-to-mcore", help="Hugging Face to Megatron's torch_dist")
    for name, what in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        there.add_argument(f"--{name}", type=int, default=1, help=f"{what} parallel size [ranks]")
    there.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin files")
    back = commands.add_parser("mcore-to-hf", help="Megatron's torch_dist to Hugging Face")
    back.add_argument("--config", type=Path, help="folder of config.json (default: the one that "
                      "travels with the checkpoint)")  # fmt: skip
    back.add_argument("--file-size", type=float, default=5.0, help="of one file [GB] (default: 5)")
    back.add_argument("--adapter", action="store_true", help="write LoRA's adapters alone, in "
                      "PEFT's format (default: merge them into the weights)")  # fmt: skip
    back.add_argument("--base-model", help="with --adapter, the model that they belong to, by its "
                      "name or folder (default: the one that was converted)")  # fmt: skip
    back.add_argument("--lora-alpha", type=float, help="of a checkpoint with adapters whose "
                      "arguments don't say it")  # fmt: skip
    for command, source in ((there, "HF_DIR"), (back, "CKPT")):
        command.add_argument("source", metavar=source, type=Path)
        command.add_argument("out", metavar="OUT", type=Path)
        command.add_argument("--backend", choices=("own", "megatron-bridge"), default="own",
                             help="what converts (default: own)")  # fmt: skip
        command.add_argument("--widen-vocabulary", action="store_true", help="give the model a "
                             "word for each id of a tokenizer that has more")  # fmt: skip
        command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: theirs)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Plan, print the plan, convert.

    Raises:
        ValueError: what can't be converted, in one sentence.
    """
    if args.backend == "megatron-bridge":
        from megatron_dr.mcore.convert import bridge

        return bridge.convert(args)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.command == "hf-to-mcore":
        import_hf(args, dtype)
    else:
        export_hf(args, dtype)


def import_hf(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """The way there."""
    number, processes = rank()
    layout = to_megatron.Layout(args.tp, args.pp, args.ep)
    with agreed():
        plan = to_megatron.plan(
            args.source, layout, dtype, args.allow_pickle, args.widen_vocabulary
        )
    if number == 0:
        print(plan.describe(processes), flush=True)
    to_megatron.convert(plan, args.out)
    if number == 0:
        flags = (args.out / "hf" / "megatron_flags.txt").read_text().strip()
        print(f"written: {args.out}\nload it with: --load {args.out} {flags}")


def export_hf(args: argparse.Namespace, dtype: torch.dtype | None) -> None:
    """The way back: the whole model, or its adapters alone."""
    number, _ = rank()
    if not 0 < args.file_size < math.inf:
        raise ValueError(f"--file-size must be a number of GB above 0, not {args.file_size}.")
    size = int(args.file_size * 1e9)
    with agreed():
        export = from_megatron.plan(
            args.source, args.config, dtype, size, args.lora_alpha, args.widen_vocabulary
        )
        found = export.adapters
        if args.adapter and found is None:
            raise ValueError(f"{export.reader.folder}: --adapter, but it has no adapters.")
        base = base_model(args, export) if args.adapter else ""
    if number == 0:
        lora = "" if found is None else f", LoRA of rank {found.rank} and alpha {found.alpha:g}"
        what = "its adapters alone" if args.adapter else f"{len(export.files)} files"
        print(f"{export.reader.folder}: {export.model.architecture}{lora}, {what}, "
              f"written as {str(export.dtype)[6:]}", flush=True)  # fmt: skip
    if args.adapter and found is not None:
        adapters.write(found, export.tensors, export.dtype, base, args.out)
    else:
        from_megatron.convert(export, args.out)
    if number == 0:
        print(f"written: {args.out}")


def base_model(args: argparse.Namespace, export: from_megatron.Export) -> str:
    """What PEFT loads before the adapters: as given, the one converted, or --config's.

    Raises:
        ValueError: nobody says it.
    """
    if args.base_model is not None:
        return str(args.base_model)
    recorded = export.assets / assets.BASE
    if recorded.is_file():
        return recorded.read_text(encoding="utf-8").strip()
    if has_weights(export.assets):
        return assets.name_of(export.assets)
    raise ValueError(
        f"{export.assets}: it doesn't say which model the adapters belong to; name it with "
        "--base-model."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for what can't be converted."""
    args = arguments(argv)
    return ranks.run("convert", lambda: run(args))
