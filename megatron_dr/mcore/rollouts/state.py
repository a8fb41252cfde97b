"""A model lent to inference: what evaluation changes in it is put back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_dr.mcore import random_state

# Attributes through which Megatron's modules know that the sequence is split over tensor ranks.
_SPLIT = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def evaluating(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """No gradients and evaluation mode; on leaving, every module's mode and all RNGs are as before.

    With --overlap-param-gather the parameters of the last optimizer step are gathered first.
    """
    modes = [(module, module.training) for chunk in model for module in chunk.modules()]
    hooked: list[Any] = [c for c in model if getattr(c, "remove_forward_pre_hook_handles", None)]
    random = random_state.save()
    for chunk in hooked:
        chunk.disable_forward_pre_hook()
    try:
        for chunk in model:
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for chunk in hooked:
            chunk.enable_forward_pre_hook()
        random_state.restore(random)


@contextmanager
def unsplit_sequence(model: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Sequence parallelism off: a decoding step has one token, which tensor ranks can't share."""
    found: list[tuple[Any, str]] = []
    for chunk in model:
        for module in chunk.modules():
            for holder in (module, getattr(module, "config", None)):
                names = _SPLIT if holder is module else _SPLIT[:1]
                found += [(holder, name) for name in names if getattr(holder, name, False) is True]
    try:
        for holder, name in found:
            setattr(holder, name, False)
        yield
    finally:
        for holder, name in found:
            setattr(holder, name, True)
