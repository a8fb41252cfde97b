"""NVIDIA's Megatron-Bridge as the converter, where it is installed: `--backend megatron-bridge`."""

import importlib
from argparse import Namespace


def convert(args: Namespace) -> None:
    """Run Megatron-Bridge's own import or export; args are those of tools/convert.py.

    Raises:
        ValueError: it isn't installed, or a flag that it has no counterpart for.
    """
    names = (
        "dtype", "adapter", "base_model", "lora_alpha", "allow_pickle", "widen_vocabulary",
    )  # fmt: skip
    given = [f"--{n.replace('_', '-')}" for n in names if getattr(args, n, None)]
    given += [f"--{n}" for n in ("tp", "pp", "ep") if getattr(args, n, 1) != 1]
    if given:
        raise ValueError(f"--backend megatron-bridge does not know {given[0]}: drop the flag.")
    if args.out.exists():
        raise ValueError(f"{args.out}: exists already.")
    try:
        auto = importlib.import_module("megatron.bridge").AutoBridge
    except ImportError as error:
        raise ValueError(
            f"--backend megatron-bridge needs the package megatron-bridge, which can't be imported "
            f"({error}): use NVIDIA's NeMo container, or drop the flag."
        ) from None
    if args.command == "hf-to-mcore":
        auto.import_ckpt(str(args.source), str(args.out))
        return
    if args.config is None:
        raise ValueError("--backend megatron-bridge needs --config: a folder with config.json.")
    auto.from_hf_pretrained(str(args.config)).export_ckpt(str(args.source), str(args.out))
