"""Datasets of both roles on disk, and Megatron's arguments for them on ranks."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.training.argument_utils  # noqa: F401  (here, and not in every rank)
import torch
import transformers.models.auto  # noqa: F401
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import destroy_global_vars

from megatron_dr.mcore import cpu, errors
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.loop import adaptor

from ._ranks import run_ranks

LENGTH, SAMPLES = 16, 10
TOKENIZER = Path(__file__).parents[2] / "examples" / "sft" / "tokenizer"
MODEL = f"""--num-layers 2 --hidden-size 16 --num-attention-heads 2
    --max-position-embeddings {LENGTH} --seq-length {LENGTH} --micro-batch-size 1
    --train-iters 4 --lr 1e-3
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {TOKENIZER}"""
ONE = (*"--split 1,0,0 --data-path".split(),)


def jsonl(folder: Path, name: str, *more: str) -> str:
    """A file of ten texts `<name> <number>`, and more lines."""
    lines = [json.dumps({"text": f"{name} {n}"}) for n in range(SAMPLES)]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join([*lines, *more]))
    return str(path)


def indexed(folder: Path, documents: int = SAMPLES, name: str = "indexed", start: int = 0) -> str:
    """The prefix of an indexed dataset of documents of one sequence each, no token twice."""
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"))
    for first in range(start, start + documents * LENGTH, LENGTH):
        builder.add_document(torch.arange(first, first + LENGTH), [LENGTH])
    builder.finalize(str(folder / f"{name}.idx"))
    return str(folder / name)


def arguments(*flags: str, tp: int = 1) -> Any:
    """Megatron's arguments as a run of ours has them; the ranks' groups."""
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    adaptor.enable()
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron wants it with tensor parallelism
    cpu_flags = [f for f in cpu.CPU_FLAGS if f != "--no-create-attention-mask-in-dataloader"]
    ours = [*cpu_flags, *MODEL.split(), "--tensor-model-parallel-size", str(tp), *flags]
    sys.argv = ["train", *ours]
    destroy_global_vars()  # a rank may ask again
    destroy_num_microbatches_calculator()
    return parse_and_validate_args()


def on_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: int = 60, tp: int = 1
) -> list[Any]:
    """The function's values, or the one sentence with which the ranks left."""
    return run_ranks(world, _left, function, tp, args, timeout=timeout)


def _left(function: Callable[..., Any], tp: int, args: tuple[Any, ...]) -> Any:
    said: list[str] = []

    def leave(message: str) -> None:
        said.append(message)
        raise SystemExit(2)

    errors.leave = leave  # type: ignore[assignment]  # this rank is a fork: said, not printed
    try:
        return function(tp, *args)
    except SystemExit:
        return said[0]


def text(sample: dict[str, torch.Tensor]) -> str:
    """The tokens before the first end token, as text."""
    return bytes(sample["tokens"].tolist()[: sample["tokens"].tolist().index(256)]).decode()


def general(tp: int, flags: list[str], numbers: list[int]) -> Any:
    args = arguments(*flags, tp=tp)
    built: Any = None
    with errors.refused():  # as in adaptor.datasets_provider
        built = datasets.general_datasets(args, numbers, None)
    return [None if d is None else [text(s) for s in map(d.__getitem__, range(len(d)))]
            for d in built]  # fmt: skip


def target(tp: int, path: str, flags: list[str], micro: int, microbatches: int) -> Any:
    """What this data rank's stream gives: lists of tokens; None where it reads nothing."""
    args = arguments(*flags, tp=tp)
    samples = datasets.target_samples(args, path)
    (stream,) = datasets.target_streams(args, samples, micro, 1, args.data_parallel_size)
    if stream is None:
        return None
    return [row for _ in range(microbatches) for row in next(stream)["tokens"].tolist()]
