"""Compare a Megatron checkpoint with a Hugging Face one: every tensor, and the logits of a prompt.

    megatron-dr verify HF_DIR CKPT
    torchrun --nproc-per-node 4 -m megatron_dr verify HF_DIR CKPT --tp 2 --pp 2

Tensors are compared bit by bit (after a cast where the dtypes differ), logits in float32 on the CPU
with those of transformers. It needs transformers, and Megatron loads the whole model.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.cli import ranks
from megatron_dr.cli.main import parser_of
from megatron_dr.hf import from_megatron
from megatron_dr.hf.config import read_model
from megatron_dr.hf.mapping import Box, hf_shapes
from megatron_dr.hf.output import agreed, rank
from megatron_dr.hf.source import Source


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("verify", __doc__)
    parser.add_argument("source", metavar="HF_DIR", type=Path)
    parser.add_argument("checkpoint", metavar="CKPT", type=Path)
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size [ranks]")
    parser.add_argument("--pp", type=int, default=1, help="pipeline parallel size [ranks]")
    parser.add_argument("--prompt", help="text (default: 64 token ids, no tokenizer needed)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the logits' difference, "
                        "relative to the largest logit (default: 1e-4)")  # fmt: skip
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin files")
    args = parser.parse_args(argv)
    if not 0 <= args.tolerance < 1:  # inf would let anything pass, NaN nothing
        parser.error(f"--tolerance must be at least 0 and below 1, not {args.tolerance}.")
    return args


def unfit_tensors(source: Source, export: from_megatron.Export) -> dict[str, str]:
    """Tensors that can't be compared, and why: transformers couldn't load the folder either."""
    why = {}
    for name, shape in hf_shapes(export.tensors).items():
        if name not in source.places:
            why[name] = f"not in {source.folder}"
        elif source.about(name)[0] != shape:
            why[name] = f"{list(source.about(name)[0])}, in the checkpoint {list(shape)}"
    return why


def differing_tensors(source: Source, export: from_megatron.Export) -> list[str]:
    """Names of tensors that aren't equal bit for bit; this process's share of them."""
    number, processes = rank()
    names, unfit = [], unfit_tensors(source, export)
    for tensor in export.tensors[number::processes]:
        for name, found in export.read(tensor).items():
            if name not in unfit:
                own = source.read(name, whole(tuple(found.shape)))
                names += [] if own.to(found.dtype).equal(found) else [name]
    return names


def whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def misread_tensors(source: Source, model: Any) -> list[str]:
    """Tensors whose files transformers read otherwise than we: it may choose other ones."""
    return [
        f"{name} (as transformers reads {source.folder})"
        for name, found in model.state_dict().items()
        if name in source.places
        and not source.read(name, whole(tuple(found.shape))).to(found.dtype).equal(found)
    ]


def tokens_of(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """Token ids [1, length] of the prompt."""
    if args.prompt is None:
        return (torch.arange(64) * 7919 % vocabulary)[None]
    import transformers

    kind = transformers.AutoTokenizer  # without a word it asks, and runs what a yes allows
    tokenizer = kind.from_pretrained(args.source, trust_remote_code=False)
    ids: torch.Tensor = tokenizer(args.prompt, return_tensors="pt").input_ids
    return ids


def expected_logits(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """transformers' logits [1, length, vocabulary], in float32 on the CPU.

    What it has read otherwise than the tensors that were compared is printed.
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    for name in misread_tensors(source, model):
        print(f"differs: {name}", flush=True)
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def logits(
    args: argparse.Namespace, source: Source, export: from_megatron.Export
) -> tuple[float, float] | None:
    """On the last process: largest difference of logits, and the largest logit (collective)."""
    tokens = tokens_of(args, export.model.vocabulary)
    last = dist.get_rank() == dist.get_world_size() - 1
    # before Megatron's CUDA names are replaced: transformers then loads wrong rotary frequencies
    expected = expected_logits(source, tokens) if last else None

    from megatron_dr.mcore import cpu

    cpu.enable()  # before Megatron is imported

    from megatron_dr.mcore.convert import hf_model

    hf_model.initialize(args.tp, args.pp)
    rows = export.reader.tensors["embedding.word_embeddings.weight"].size[0]
    gpt = hf_model.build(export.model, rows, export.adapters)
    hf_model.load(gpt, export.reader.folder)
    found = hf_model.logits(gpt, tokens)
    if found is None or expected is None:
        return None
    difference = (found[..., : export.model.vocabulary] - expected).abs().max()
    return difference.item(), expected.abs().max().item()


def verify(args: argparse.Namespace) -> bool:
    """Whether tensors and logits agree; each process says what it found.

    Raises:
        ValueError: a checkpoint that can't be read.
    """
    if args.tp * args.pp != dist.get_world_size():
        raise ValueError(f"--tp {args.tp} --pp {args.pp} need {args.tp * args.pp} processes.")
    with agreed():
        export = from_megatron.plan(args.checkpoint)
        source = Source(args.source, args.allow_pickle)
        same_words = read_model(args.source).vocabulary == export.model.vocabulary
        unfit = unfit_tensors(source, export)
        names = differing_tensors(source, export)
    if dist.get_rank() == 0:
        said = [source.note] if source.note else []
        said += [] if same_words else [f"differs: vocab_size of {args.source}/config.json"]
        said += [f"differs: {name} ({reason})" for name, reason in unfit.items()]
        print("\n".join(said), end="\n" if said else "", flush=True)
    for name in names:
        print(f"differs: {name}", flush=True)
    agree = torch.tensor(float(not names and not unfit and same_words))
    compared = logits(args, source, export) if same_words and not unfit else None
    if compared is not None:
        difference, largest = compared
        print(f"logits: largest difference {difference:.2e}, largest logit {largest:.3g}")
        agree *= float(difference <= args.tolerance * largest)
    dist.all_reduce(agree, dist.ReduceOp.MIN)
    if dist.get_rank() == 0:
        print("they agree" if agree else "they do NOT agree", flush=True)
    return bool(agree)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where they differ, 2 for what can't be read."""
    args = arguments(argv)
    return ranks.run("verify", lambda: verify(args), alone=True)
