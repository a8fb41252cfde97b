"""Both roles' data in Megatron's terms: running text as it is, samples as a dataset class."""

import argparse
import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.utils import is_first_or_last_pipeline_stage

from megatron_dr.data import files, indexed
from megatron_dr.data.order import Samples, TargetStream
from megatron_dr.data.packing import PackedSamples
from megatron_dr.mcore import errors
from megatron_dr.mcore.data import ids
from megatron_dr.mcore.data.blend import blends
from megatron_dr.mcore.data.ids import Text
from megatron_dr.mcore.data.samples import SampleDataset, is_file, is_samples, open_samples
from megatron_dr.mcore.data.vocabulary import largest_id


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its flags."""
    blend, blend_per_split = blends(args)
    counts = args.per_dataset_sequences_path
    config = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, blend=blend,
        blend_per_split=blend_per_split, split=args.split, full_validation=args.full_validation,
        multiple_validation_sets=args.multiple_validation_sets,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path, mmap_bin_files=args.mmap_bin_files,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=None if counts is None else _counts(counts),
        tokenizer=build_tokenizer(args), reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask, eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )  # fmt: skip
    config.packed = bool(getattr(args, "dr_pack", None))  # what `SampleDataset` asks for
    return config


def _counts(path: str) -> dict[str, Any]:
    """Sequences and documents of each dataset, as Megatron's --per-dataset-sequences-path has them.

    Raises:
        ValueError: no such file, or another one.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--per-dataset-sequences-path {path}: can't be read ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"--per-dataset-sequences-path {path}: it must be a table by path.")
    return found


def names_samples(args: argparse.Namespace) -> bool:
    """Whether the general data are samples, which Megatron's own datasets don't know."""
    blend, per_split = blends(args)
    return any(
        is_samples(path) for found in (blend, *(per_split or [])) if found for path in found[0]
    )


def general_datasets(
    args: argparse.Namespace, num_samples: list[int], vp_stage: int | None
) -> tuple[Any, Any, Any]:
    """Train, validation and test sets of the general role, blended as Megatron blends them.

    Raises:
        ValueError: a path that is not there, or JSONL and indexed datasets in one run.
    """
    config = dataset_config(args)
    paths = blended_paths(config)
    for path in paths:
        _check_path(path)
    _check_kinds(["--mock-data"] if args.mock_data else paths, config.packed)
    samples = any(map(is_samples, paths))
    if not paths and not args.mock_data:
        raise ValueError(
            "no general data: give --data-path or --train-data-path (or --mock-data to try it out)."
        )
    with errors.agreed():  # before the builder, in which ranks wait for one another
        config.samples = {}
        if samples and _has_data(vp_stage, config.packed):
            config.samples = {path: open_samples(path, config) for path in paths}
            check_splits(config, num_samples)
        elif not samples and _has_data(vp_stage, config.packed):
            for path in paths:
                _check_text(path, config)
    kind = MockGPTDataset if args.mock_data else SampleDataset if samples else Text
    builder = BlendedMegatronDatasetBuilder(
        kind, num_samples, lambda: _has_data(vp_stage, config.packed), config
    )
    train, valid, test = (part if part is None or len(part) else None for part in builder.build())
    settle_validation(args, valid, test)
    return train, valid, test


def settle_validation(args: argparse.Namespace, valid: Any, test: Any) -> None:
    """Without a general validation set there is no validation (collective).

    Megatron 0.19 begins one wherever --eval-iters is above 0, and its default is 100.

    Raises:
        ValueError: something else was to be evaluated with it, or all of it.
    """
    here = [valid is not None, test is not None]
    found = torch.tensor(here, dtype=torch.int, device=torch.cuda.current_device())
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    if found[0] or not (args.eval_iters or args.full_validation):
        return
    test_data = getattr(args, "dr_target_test_data", None)
    otherwise = "drop it" if args.full_validation or test_data else "--eval-iters 0"
    wanted = {
        "a test set": found[1],
        "--dr-target-test-data": test_data,
        "--dr-target-valid-data": getattr(args, "dr_target_valid_data", None),
        "--full-validation": args.full_validation,
    }
    for what in (what for what, given in wanted.items() if given):
        raise ValueError(
            f"{what} is evaluated as the general validation set is, but there is none: give "
            f"--valid-data-path, or {otherwise}."
        )
    args.eval_iters = 0


def _check_kinds(paths: list[str], packed: bool) -> None:
    """Refuse samples beside running text, and running text in packs."""
    text = [path for path in paths if not is_samples(path)]
    if text and len(text) < len(paths):
        sample = next(path for path in paths if is_samples(path))
        raise ValueError(
            "the general data mixes samples (files, indexed datasets with a _loss_mask beside "
            f"them: {sample}) and running text ({text[0]}): a blend is of one kind."
        )
    if text and packed:
        raise ValueError(
            f"--dr-pack packs samples, and {text[0]} is running text that fills its sequences: "
            "give files of samples or prepared datasets with loss masks, or drop --dr-pack."
        )


def check_splits(config: GPTDatasetConfig, num_samples: list[int]) -> None:
    """Refuse a --split that leaves a file without samples where some are asked for."""
    if config.blend is None:
        return
    for path in config.blend[0]:
        size = len(config.samples[path])
        for split, share, wanted in zip(Split, config.split_matrix, num_samples, strict=True):
            if share is not None and wanted and round(share[0] * size) == round(share[1] * size):
                raise ValueError(
                    f"{path}: no sample is left for {split.name} of {size}: change --split, or "
                    "give --train-data-path and --valid-data-path."
                )


def blended_paths(config: GPTDatasetConfig) -> list[str]:
    blends = [config.blend, *(config.blend_per_split or [])]
    return [path for blend in blends if blend is not None for path in blend[0]]


def _check_path(path: str) -> None:
    if is_file(path):
        files.list_files([path])
    elif not os.path.isfile(path + ".idx") or not os.path.isfile(path + ".bin"):
        raise ValueError(
            f"{path}: no such data; an indexed dataset is named by its path without .bin and .idx, "
            f"a file of samples by a path that ends in {', '.join(files.SUFFIXES)}."
        )


def _check_text(path: str, config: GPTDatasetConfig) -> None:
    """Refuse running text that is damaged, or has ids that the tokenizer lacks."""
    indexed.check(path)
    ids.check(IndexedDataset(path), path, largest_id(config.tokenizer))


def _has_data(vp_stage: int | None, packed: bool) -> bool:
    """Whether this rank reads data: the first tensor-parallel rank of an end of the pipeline, and
    with packs of every stage, whose attention needs to know where samples begin."""
    first = mpu.get_tensor_model_parallel_rank() == 0
    reads = packed or is_first_or_last_pipeline_stage(vp_stage)
    return bool(first and reads)


def target_samples(args: argparse.Namespace, path: str) -> Samples:
    """The whole target set of a path.

    Raises:
        ValueError: no such data, or a wrong line.
    """
    _check_path(path)
    config = dataset_config(args)
    if is_samples(path):
        samples: Any = open_samples(path, config)
        return PackedSamples(samples, args.seed) if config.packed else samples
    _check_kinds([path], config.packed)
    _check_text(path, config)
    config = copy.copy(config)
    config.mock, config.blend, config.blend_per_split = False, ([path], None), None
    config.split, config.split_matrix = "1,0,0", [(0.0, 1.0), None, None]
    text: Samples = BlendedMegatronDatasetBuilder(
        Text, (None, None, None), lambda: True, config
    ).build()[0]
    if len(text) == 0:
        raise ValueError(
            f"{path}: shorter than one sequence of {args.seq_length} tokens and the next token."
        )
    return text


def target_streams(
    args: argparse.Namespace, samples: Samples, micro_batch_size: int, num_chunks: int, ranks: int,
    everywhere: bool = False,
) -> list[TargetStream | None]:  # fmt: skip
    """One stream per model chunk, all at the same place; None where this rank reads no data.

    Args:
        ranks: the first so many data-parallel ranks share the samples.
        everywhere: no rank is told of a microbatch by another.
    """
    packed, rank = isinstance(samples, PackedSamples), mpu.get_data_parallel_rank()
    streams: list[TargetStream | None] = []
    for chunk in range(num_chunks):
        stage = chunk if num_chunks > 1 else None
        reads = rank < ranks and (everywhere or _has_data(stage, packed))
        stream = TargetStream(samples, micro_batch_size, rank, size=ranks, seed=args.seed)
        streams.append(stream if reads else None)
    return streams
