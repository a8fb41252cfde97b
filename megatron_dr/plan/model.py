"""A GPT's parameters, and those that a rank holds of it, in the order of Megatron's modules."""

from dataclasses import dataclass
from typing import Literal

from megatron_dr.plan.layout import Layout


@dataclass(frozen=True)
class Model:
    """Sizes of a dense or MoE GPT.

    Attributes:
        head: elements of an attention head; 0: hidden / heads.
        groups: key and value heads.
        gated: the MLP has a gate (SwiGLU).
        biases: of all linear layers; qkv_bias: of query, key and value alone.
        norm_bias: LayerNorm in place of RMSNorm.
        experts, expert_ffn, active: of an MoE layer, and how many of them a token visits.
        multiple: the vocabulary is padded to a multiple of it times the tensor ranks.
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocabulary: int
    head: int = 0
    tied: bool = False
    gated: bool = True
    biases: bool = False
    qkv_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    expert_ffn: int = 0
    active: int = 0
    multiple: int = 128

    @property
    def head_size(self) -> int:
        return self.head or self.hidden // self.heads

    def padded(self, tp: int) -> int:
        """`training/vocab_utils.py`, calculate_padded_vocab_size."""
        return -(-self.vocabulary // (self.multiple * tp)) * self.multiple * tp


@dataclass(frozen=True)
class Parameter:
    """What a rank holds of one.

    Attributes:
        partial: ranks over which Megatron sums its gradient after the data-parallel reduction
            (`megatron_dr/mcore/ownership.py`).
        expert: it is reduced over the ranks that hold the same experts.
        share: of a rank's tokens that pass through it, which is what it computes.
    """

    numel: int
    partial: Literal["", "tensor", "embedding"] = ""
    expert: bool = False
    share: float = 1.0


def parameters(model: Model, layout: Layout, stage: int) -> list[list[Parameter]]:
    """Of each model chunk of a stage (`core/models/gpt/gpt_model.py`)."""
    embedding = model.padded(layout.tp) // layout.tp * model.hidden
    partial: Literal["", "embedding"] = "embedding" if model.tied and layout.pp > 1 else ""
    layers, chunks = layout.layers_of_a_chunk(model.layers), []
    for number in range(layout.vpp):
        first = stage == 0 and number == 0
        last = stage == layout.pp - 1 and number == layout.vpp - 1
        held = [p for _ in range(layers) for p in _layer(model, layout)]
        if first:  # both of one rank's: the embedding looks up, the output layer multiplies
            share = 1.0 if model.tied and last else 0.0
            held.insert(0, Parameter(embedding, partial, share=share))
        if last:
            held += _norm(model, layout, model.hidden)
        if last and not (model.tied and first):
            held.append(Parameter(embedding, partial))
        chunks.append(held)
    return chunks


def _layer(model: Model, layout: Layout) -> list[Parameter]:
    """`core/transformer/transformer_layer.py`, attention.py, mlp.py."""
    h, head, tp = model.hidden, model.head_size, layout.tp
    qkv = (model.heads + 2 * model.groups) * head
    out = _norm(model, layout, h)
    out += _linear(model, layout, model.heads * head, h, columns=False)
    out.append(Parameter(qkv // tp * h))
    if model.biases or model.qkv_bias:
        out.append(Parameter(qkv // tp))
    for _ in range(2 if model.qk_norm else 0):  # summed over tensor ranks in any case
        out += [Parameter(head, "tensor")] * (2 if model.norm_bias else 1)
    out += _norm(model, layout, h)
    return out + (_experts if model.experts else _mlp)(model, layout)


def _norm(model: Model, layout: Layout, size: int) -> list[Parameter]:
    return [_replicated(layout, size)] * (2 if model.norm_bias else 1)


def _replicated(layout: Layout, numel: int) -> Parameter:
    return Parameter(numel, "tensor" if layout.sequence_parallel else "")


def _linear(
    model: Model, layout: Layout, inputs: int, outputs: int, columns: bool
) -> list[Parameter]:
    """Sharded by its outputs (columns) or inputs; a bias lies with the outputs."""
    out = [Parameter(inputs * outputs // layout.tp)]
    if model.biases:
        bias = Parameter(outputs // layout.tp) if columns else _replicated(layout, outputs)
        out.append(bias)
    return out


def _mlp(model: Model, layout: Layout) -> list[Parameter]:
    up = _linear(model, layout, model.hidden, model.ffn * (2 if model.gated else 1), columns=True)
    return up + _linear(model, layout, model.ffn, model.hidden, columns=False)


def _experts(model: Model, layout: Layout) -> list[Parameter]:
    """The router and this rank's experts (`core/transformer/moe/`).

    Tokens are taken to be dealt out evenly.
    """
    out = [_replicated(layout, model.experts * model.hidden)]
    share = model.active * layout.ep / model.experts
    for _ in range(model.experts // layout.ep):
        for numel in (model.expert_ffn * model.hidden * (2 if model.gated else 1),
                      model.expert_ffn * model.hidden):  # fmt: skip
            out.append(Parameter(numel // layout.etp, "", layout.own_expert_group, share))
    return out
