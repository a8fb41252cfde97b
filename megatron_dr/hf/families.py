"""The table: each tensor of Megatron's checkpoint and the Hugging Face tensors that it is made of.

One entry says both directions. It lists, in the order of Megatron's rows, which rows of which
Hugging Face tensor they are; reading it from right to left splits Megatron's tensor again:

    linear_qkv, per group g of n query heads   rows g n d .. of q, rows g d .. of k, of v, ...
    linear_fc1                                 gate, then up
    everything else                            the tensor itself

Names are those that megatron.core's local and Transformer Engine layers share in a torch_dist
checkpoint (tests/mcore/test_convert.py compares them with Megatron's own). `split` is the dimension
that tensor-parallel ranks divide; linear_fc1 is two matrices, each divided by itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_dr.hf.model import Model

# (number of the Hugging Face tensor, first row, rows), in the order of Megatron's rows
Rows = Callable[[Model], list[tuple[int, int, int]]]


@dataclass(frozen=True)
class Entry:
    """One tensor, of one layer and one expert where its name says so.

    Attributes:
        key: Megatron's name. Layers (and experts) are axes in front of the tensor's own.
        names: Hugging Face's, with {layer} and {expert}.
        columns: size of the second dimension; None: a vector.
        split: dimension divided over tensor-parallel ranks, None: a copy on each.
        stacked: number of matrices stacked along the rows, each divided by itself.
        extra: whether Megatron keeps an (empty) `_extra_state` beside the weight.
        alias: what Megatron's local layers call it where Transformer Engine's have another name
            (the norm before experts); written under both, read from either.
    """

    key: str
    names: tuple[str, ...]
    rows: Rows
    columns: Callable[[Model], int] | None
    split: Literal[0, 1] | None
    stage: Literal["first", "layers", "last"]
    when: Callable[[Model], bool] = lambda _: True
    stacked: int = 1
    extra: bool = False
    alias: str | None = None


def _one(rows: Callable[[Model], int]) -> Rows:
    return lambda model: [(0, 0, rows(model))]


def _hidden(model: Model) -> int:
    return model.hidden_size


def _qkv(model: Model) -> list[tuple[int, int, int]]:
    size, query = model.head_size, model.heads // model.groups * model.head_size
    return [
        part
        for g in range(model.groups)
        for part in ((0, g * query, query), (1, g * size, size), (2, g * size, size))
    ]


def _gate_up(model: Model) -> list[tuple[int, int, int]]:
    return [(0, 0, model.ffn_size), (1, 0, model.ffn_size)]


def _layer(key: str, *names: str, **more: Any) -> Entry:
    names = tuple(f"model.layers.{{layer}}.{name}" for name in names)
    return Entry("decoder.layers." + key, names, stage="layers", **more)


# What tensors of one kind have in common.
_NORM: dict[str, Any] = dict(rows=_one(_hidden), columns=None, split=None)
_QK_NORM: dict[str, Any] = _NORM | dict(rows=_one(lambda m: m.head_size), when=lambda m: m.qk_norm)
_FC1: dict[str, Any] = dict(rows=_gate_up, columns=_hidden, split=0, stacked=2, extra=True)
_FC2: dict[str, Any] = dict(rows=_one(_hidden), columns=lambda m: m.ffn_size, split=1, extra=True)
_VOCABULARY: dict[str, Any] = dict(rows=_one(lambda m: m.vocabulary), columns=_hidden, split=0)
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

_SHARED = (
    Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), stage="first",
          **_VOCABULARY),
    Entry("decoder.final_layernorm.weight", ("model.norm.weight",), stage="last", **_NORM),
    Entry("output_layer.weight", ("lm_head.weight",), stage="last",
          when=lambda model: not model.tied, **_VOCABULARY),
    _layer("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", **_NORM),
    _layer("self_attention.linear_qkv.weight", *(f"{p}.weight" for p in _PROJECTIONS),
           rows=_qkv, columns=_hidden, split=0, extra=True),
    _layer("self_attention.linear_qkv.bias", *(f"{p}.bias" for p in _PROJECTIONS),
           rows=_qkv, columns=None, split=0, when=lambda model: model.qkv_bias),
    _layer("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", **_QK_NORM),
    _layer("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", **_QK_NORM),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight",
           rows=_one(_hidden), columns=lambda m: m.heads * m.head_size, split=1, extra=True),
)  # fmt: skip

_DENSE = (
    *_SHARED,
    _layer("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", **_NORM),
    _layer("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", **_FC1),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", **_FC2),
)


def _moe(block: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    expert = f"{block}.experts.{{expert}}"
    return (
        *_SHARED,
        _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", **_NORM,
               alias="decoder.layers.mlp.linear_fc1.layer_norm_weight"),
        _layer("mlp.router.weight", f"{block}.gate.weight",
               rows=_one(lambda m: m.experts), columns=_hidden, split=None),
        _layer("mlp.experts.experts.linear_fc1.weight", f"{expert}.{gate}.weight",
               f"{expert}.{up}.weight", **_FC1),
        _layer("mlp.experts.experts.linear_fc2.weight", f"{expert}.{down}.weight", **_FC2),
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Models of one architecture: its tensors and what its config.json leaves unsaid.

    Attributes:
        fixed: configuration values that can't be anything else here.
        groups_default: as many key/value heads as heads where config.json names none.
        head_size: size of a head where config.json names none; 0: hidden size / heads.
        window_switch: the sliding window counts only with `use_sliding_window`.
        experts_key: the number of experts' name; None: a dense family.
    """

    architecture: str
    entries: tuple[Entry, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    groups_default: bool = False
    head_size: int = 0
    rope_base: float = 10000.0
    window_switch: bool = False
    ffn_key: str = "intermediate_size"
    experts_key: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


_NO_BIAS = {"attention_bias": False}  # Megatron can't have it without biases in the MLP

FAMILIES = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM", _DENSE, groups_default=True, fixed=_NO_BIAS),
        Family("MistralForCausalLM", _DENSE),
        Family("Qwen2ForCausalLM", _DENSE, qkv_bias=True, window_switch=True),
        Family("Qwen3ForCausalLM", _DENSE, qk_norm=True, head_size=128, window_switch=True,
               fixed=_NO_BIAS),
        Family(
            "MixtralForCausalLM", _moe("block_sparse_moe", "w1", "w3", "w2"),
            rope_base=1e6, experts_key="num_local_experts",
        ),
        Family(
            "Qwen3MoeForCausalLM", _moe("mlp", "gate_proj", "up_proj", "down_proj"),
            qk_norm=True, window_switch=True, ffn_key="moe_intermediate_size",
            experts_key="num_experts", fixed=_NO_BIAS,
        ),
    )
}  # fmt: skip


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: no architecture, or one that isn't in the table.
    """
    found = config.get("architectures") or []
    names = [str(name) for name in found] if isinstance(found, list) else [str(found)]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ValueError(
        f"config.json: architecture {', '.join(names) or 'unnamed'} can't be converted; known are "
        f"{', '.join(FAMILIES)}."
    )
