"""Prompts, samplings and the slow oracle of rollouts: whole sequences, float64, Python loops."""

from typing import Any
from unittest import mock

import torch

from megatron_dr.mcore.rollouts.token_choice import uniform
from megatron_dr.rl.rollouts import SamplingParams, sample_seed

from . import _oracle
from ._data import VOCAB, Layout

CONTEXT, SEED = 16, 11
PROMPTS = [[5, 1, 2], [7], [9, 8, 7, 6, 5, 4, 3], [5, 1, 2], [60, 0], [3] * 14]
SAMPLINGS = (
    SamplingParams(6, temperature=0.0),
    SamplingParams(6),
    SamplingParams(5, temperature=1.5, top_p=0.7),
)
WORDS, PLACES = "embedding.word_embeddings.weight", "embedding.position_embeddings.weight"
Written = list[tuple[list[int], list[float], str]]


def initial(layout: Layout, learned: bool = False) -> dict[str, torch.Tensor]:
    """As the training tests', with sharper predictions and, if asked for, learned positions."""
    out = _oracle.initial(layout)
    name = WORDS if layout.tied else "output_layer.weight"
    out[name] = 4 * out[name]
    if learned:
        shape = (CONTEXT, _oracle.HIDDEN)
        out[PLACES] = torch.randn(shape, generator=torch.Generator().manual_seed(8))
    return out


def logits(p: dict[str, torch.Tensor], sequence: list[int]) -> torch.Tensor:
    """[PADDED] after a sequence."""
    tokens = torch.tensor(sequence)
    if PLACES in p:  # a vocabulary of the sequence's own (token, position) pairs, and no rotation
        p = {**p, WORDS: p[WORDS][tokens] + p[PLACES][: len(sequence)]}
        with mock.patch.object(_oracle, "_rotate", lambda x: x):
            return _oracle.logits(p, torch.arange(len(sequence)))[-1]
    return _oracle.logits(p, tokens)[-1]


def choose(values: torch.Tensor, draw: float, sampling: SamplingParams) -> int:
    """One token for logits [VOCAB], by walking through the sorted and the cumulative list."""
    if sampling.temperature == 0.0:
        return max(range(VOCAB), key=lambda k: float(values[k]))
    probabilities = (values / sampling.temperature).softmax(0).tolist()
    kept: list[int] = []
    ranked = sorted(range(VOCAB), key=lambda k: -probabilities[k])[: sampling.top_k or VOCAB]
    among = sum(probabilities[k] for k in ranked)
    for k in ranked:
        if sum(probabilities[j] for j in kept) / among < sampling.top_p:
            kept.append(k)
    total, below = sum(probabilities[k] for k in kept), 0.0
    for k in sorted(kept):
        below += probabilities[k]
        if draw * total < below:
            return k
    raise AssertionError


def complete(
    p: dict[str, torch.Tensor], number: int, sampling: SamplingParams, ends: tuple[int, ...] = ()
) -> tuple[list[int], list[float], str]:
    """Tokens, log-probabilities and finish of a prompt's completion."""
    sequence, tokens, found = list(PROMPTS[number]), [], []
    while len(tokens) < sampling.max_tokens and len(sequence) < CONTEXT:
        values = logits(p, sequence)
        draw = uniform(sample_seed(SEED, number), number, len(tokens))
        allowed = values[:VOCAB].clone()
        if len(tokens) < sampling.min_tokens:
            allowed[list(ends)] = -torch.inf
        token = choose(allowed, draw, sampling)
        found.append(float(values.log_softmax(0)[token]))
        tokens.append(token)
        sequence.append(token)
        if token in ends:
            return tokens, found, "stop"
    return tokens, found, "length"


@torch.no_grad()
def oracle(layout: Layout, learned: bool = False) -> list[Written]:
    p = {k: v.double() for k, v in initial(layout, learned).items()}
    return [[complete(p, n, sampling) for n in range(len(PROMPTS))] for sampling in SAMPLINGS]


def padded(written: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The first prompts and their completions in one tensor [n, s], and completions' mask."""
    pairs = [(prompt, ids) for prompt, (ids, _, _) in zip(PROMPTS, written, strict=False)]
    length = max(len(prompt) + len(ids) for prompt, ids in pairs)
    mask = torch.zeros(len(pairs), length)
    tokens = mask.long()
    for row, (prompt, ids) in enumerate(pairs):
        end = len(prompt) + len(ids)
        tokens[row, :end] = torch.tensor([*prompt, *ids])
        mask[row, len(prompt) : end] = 1
    return tokens, mask
