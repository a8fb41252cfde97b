"""Floating-point operations of a step: of the general batch, and of the target's.

Megatron's number (`training/training.py`, num_floating_point_operations) is of --global-batch-size
sequences; the target's microbatches are not in it. Of the general batch both are equal, which
`tests/mcore/test_plan_flags.py` holds.

    forward = 2 sum over matrices of (elements x tokens that pass) + 2 q sum over samples of L²

q: elements of a token's query, L a sample's tokens: with causal attention half of L² pairs are
computed, each twice (Q Kᵀ and its product with V), of 2 operations. A backward is twice as much.
"""

import math
from dataclasses import dataclass

from megatron_dr.plan.activations import Recompute
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model


@dataclass(frozen=True)
class Tokens:
    """Of sequences that are computed.

    Attributes:
        number: tokens.
        squares: sum of the squares of the samples' lengths: a packed sequence's samples don't see
            one another.
    """

    number: float
    squares: float

    def __mul__(self, times: float) -> "Tokens":
        return Tokens(self.number * times, self.squares * times)

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(self.number + other.number, self.squares + other.squares)


def of_sequences(sequences: float, length: int, sample: float = 0.0) -> Tokens:
    """Tokens of so many sequences.

    Args:
        sample: tokens of each sample that is packed in them; 0: one fills a sequence.
    """
    return Tokens(sequences * length, sequences * length * (sample or length))


def forward(model: Model, layout: Layout, tokens: Tokens) -> float:
    """Operations of a whole model's forward: a router's are left out, as Megatron does."""
    return model.layers * layer(model, tokens) + head(model, layout, tokens)


def layer(model: Model, tokens: Tokens) -> float:
    """Of one layer."""
    own = 2 * (model.heads + model.groups) * model.head_size * model.hidden  # q, k, v and out
    return 2 * tokens.number * (own + mlp(model)) + attention(model, tokens)


def head(model: Model, layout: Layout, tokens: Tokens) -> float:
    """Of the output layer."""
    return 2 * tokens.number * model.padded(layout.tp) * model.hidden


def attention(model: Model, tokens: Tokens) -> float:
    """Of one layer's scores and values."""
    return 2 * model.heads * model.head_size * tokens.squares


def again(model: Model, layout: Layout, recompute: Recompute, tokens: Tokens) -> float:
    """What backwards compute again of the forward."""
    if recompute.granularity == "none":
        return 0.0
    if recompute.granularity == "selective":
        out = model.layers * attention(model, tokens) if "core_attn" in recompute.modules else 0.0
        if recompute.has("moe" if model.experts else "mlp"):
            out += model.layers * 2 * tokens.number * mlp(model)
        return out
    of_chunk = layout.layers_of_a_chunk(model.layers)
    number = min(recompute.layers, of_chunk) if recompute.block else of_chunk
    return model.layers * layer(model, tokens) * number / of_chunk


def mlp(model: Model) -> float:
    """Elements of a layer's MLP, or of its active experts, that a token passes."""
    factor = (3 if model.gated else 2) * model.hidden
    return factor * (model.expert_ffn * model.active if model.experts else model.ffn)


def said(operations: float) -> str:
    """As 1.23 PFLOP."""
    if not operations:
        return "0"
    power = min(6, int(math.log10(operations)) // 3)
    return f"{operations / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}FLOP"
