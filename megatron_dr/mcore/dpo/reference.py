"""Log-probabilities of all answers by the frozen reference: the policy at the run's start.

They are found once, before training, by the training forward in evaluation mode, so that no second
model is kept. Two numbers a pair; beside the checkpoints they are in one file, by the pairs' keys.
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from megatron_dr.config.dpo import SEQUENCES
from megatron_dr.data.pairs import Pairs
from megatron_dr.mcore.collectives import of_all_ranks
from megatron_dr.mcore.dpo.step import Batch, answers, forward
from megatron_dr.mcore.rollouts import passes
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step.schedule import group_size

FILE = "dr_reference_log_probs.safetensors"
_MICROBATCHES = 16  # of a schedule call, for each pipeline stage
_PATIENCE = 10.0  # seconds between two lines on how far it is


def measure(model: Sequence[torch.nn.Module], pairs: Pairs, args: Namespace) -> torch.Tensor:
    """log p(answer | prompt) by the model as it is now: [N, 2] on the host (collective).

    Copies of the model share the pairs. Microbatches have the shape of training, so that an
    unchanged policy has a margin of 0.
    """
    group = parallel_state.get_data_parallel_group()
    size, stages = args.micro_batch_size, parallel_state.get_pipeline_model_parallel_world_size()
    stages = max(stages, group_size(model))  # as many microbatches at a time as a chunk takes
    call = size * stages * _MICROBATCHES  # pairs of a rank
    together, said = call * group.size(), time.monotonic()
    shares: list[torch.Tensor] = []
    for start in range(0, len(pairs), together):
        left = -(-min(together, len(pairs) - start) // group.size())
        own = min(call, -(-left // (size * stages)) * size * stages)
        first = start + group.rank() * own
        numbers = [min(n, len(pairs) - 1) for n in range(first, first + own)]
        shares += of_all_ranks(_log_probs(model, pairs, numbers, size, args).cpu(), group)
        if time.monotonic() - said > _PATIENCE:
            said = time.monotonic()
            done = min(start + together, len(pairs))
            say(f"reference log-probabilities: {done} of {len(pairs)} pairs of {pairs.path}")
    return torch.cat(shares)[: len(pairs)]


def _log_probs(
    model: Sequence[torch.nn.Module], pairs: Pairs, numbers: list[int], size: int, args: Namespace
) -> torch.Tensor:
    """Of some pairs [n, 2], on every rank of this copy of the model; one schedule call."""
    groups = [numbers[n : n + size] for n in range(0, len(numbers), size)]
    batches = [(default_collate([pairs[n] for n in group]) for group in groups) for _ in model]
    found_B = passes.forward_only(
        model, _answers, batches, len(groups), size * SEQUENCES, args.seq_length
    )
    return found_B.view(len(groups), SEQUENCES, size).transpose(1, 2).reshape(-1, SEQUENCES)


def _answers(model: torch.nn.Module, found: Batch) -> passes.Output:
    output, batch = forward(model, found)
    return output, lambda losses_BT: answers(losses_BT, batch)


def save(folder: Path, every: Sequence[Pairs]) -> None:
    """Write <folder>/FILE on rank 0; it is there whole or not at all."""
    if dist.get_rank() != 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[bytes, torch.Tensor] = {}
    for pairs in every:
        assert pairs.reference_N2 is not None
        found |= zip(pairs.keys, pairs.reference_N2, strict=True)
    keys = torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).view(len(found), -1)
    partial_path = folder / f"{FILE}.partial"
    save_file({"keys": keys, "log_probs": torch.stack(list(found.values()))}, partial_path)
    os.replace(partial_path, folder / FILE)


def load(folder: Path, every: Sequence[Pairs]) -> None:
    """Give the pairs what `save` wrote.

    Raises:
        ValueError: there is none, or it lacks a pair.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file, so the checkpoint is not of a run with --dr-dpo-beta: give "
            "--finetune to begin a new run from it."
        )
    try:
        file = load_file(path)
        keys, values_N2 = file["keys"].numpy(), file["log_probs"]
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: can't be read ({error}).") from None
    place = {key.tobytes(): n for n, key in enumerate(keys)}
    for pairs in every:
        numbers = [place.get(key, -1) for key in pairs.keys]
        if -1 in numbers:
            raise ValueError(
                f"{path}: the pair {pairs.origin(numbers.index(-1))} was not in the run that saved "
                "it: resume with the data and tokenizer of that run, or give --finetune to begin "
                "a new one."
            )
        pairs.reference_N2 = values_N2[torch.tensor(numbers)]
