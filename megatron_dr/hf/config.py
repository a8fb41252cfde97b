"""A model's shape: read from config.json, told to Megatron as flags, checked on the way back."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dr.hf.families import family_of
from megatron_dr.hf.fields import number, switch, whole
from megatron_dr.hf.model import Model
from megatron_dr.hf.rope import read_rope

_MOST = 10**6  # parts of a model's tensors that are listed one by one


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint's folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: no such file.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: no table of names and values, as a model's configuration is.")
    return config


def read_model(folder: Path) -> Model:
    """The model of a checkpoint's folder.

    Raises:
        ValueError: no config.json, or one that can't be converted exactly.
    """
    config = read_config(folder)
    try:
        return parse(config)
    except ValueError as error:
        raise ValueError(
            str(error).replace("config.json", str(folder / "config.json"), 1)
        ) from None


def parse(config: Mapping[str, Any]) -> Model:
    """The model of a config.json, of transformers 4 or 5.

    Raises:
        ValueError: an architecture or a choice that can't be converted exactly.
    """
    family = family_of(config)
    for name, value in {"hidden_act": "silu", "mlp_bias": False, **family.fixed}.items():
        if config.get(name) not in (None, value):
            raise ValueError(
                f"config.json: {name} {config[name]!r} can't be converted, only {value!r}."
            )
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    default = family.groups_default and config.get("num_key_value_heads") is None
    groups = heads if default else whole(config, "num_key_value_heads")
    if heads % groups:
        raise ValueError(f"config.json: {heads} heads can't be divided into {groups} groups.")
    layers, experts = whole(config, "num_hidden_layers"), _experts(config, family.experts_key)
    if layers * (groups + experts.get("experts", 0)) > _MOST:
        raise ValueError(
            f"config.json: {layers} layers of {groups} groups of heads and "
            f"{experts.get('experts', 0)} experts can't be meant."
        )
    return Model(
        architecture=family.architecture, layers=layers,
        hidden_size=hidden, ffn_size=whole(config, family.ffn_key), heads=heads, groups=groups,
        head_size=_head_size(config, family.head_size, hidden, heads),
        vocabulary=whole(config, "vocab_size"), positions=whole(config, "max_position_embeddings"),
        epsilon=number(config, "rms_norm_eps"), tied=switch(config, "tie_word_embeddings", False),
        qkv_bias=family.qkv_bias, qk_norm=family.qk_norm, rope=read_rope(config, family.rope_base),
        window=_window(config, family.window_switch), **experts,
    )  # fmt: skip


def _head_size(config: Mapping[str, Any], default: int, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return whole(config, "head_dim")
    if not default and hidden % heads:
        raise ValueError(f"config.json: hidden_size {hidden} can't be divided into {heads} heads.")
    return default or hidden // heads


def _window(config: Mapping[str, Any], by_switch: bool) -> int | None:
    """The sliding window; families with a `use_sliding_window` have it off unless switched on."""
    on = not by_switch or switch(config, "use_sliding_window", False)
    return whole(config, "sliding_window") if on and config.get("sliding_window") else None


def _experts(config: Mapping[str, Any], key: str | None) -> dict[str, Any]:
    if key is None:
        return {}
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise ValueError("config.json: layers with and without experts can't be converted.")
    # transformers 4 and 5 name the number of experts differently
    names = [name for name in ("num_local_experts", "num_experts") if config.get(name)]
    experts = whole(config, names[0] if names else key)
    top_k = whole(config, "num_experts_per_tok")
    if top_k > experts:
        raise ValueError(f"config.json: {top_k} experts per token, but only {experts} experts.")
    normalised = switch(config, "norm_topk_prob", key == "num_local_experts")
    return {"experts": experts, "top_k": top_k, "normalised": normalised}


def padded_vocabulary(model: Model, tp: int) -> int:
    """Rows of Megatron's embedding: a multiple of 128 tp, Megatron's own default."""
    multiple = 128 * tp
    return -(-model.vocabulary // multiple) * multiple


def megatron_arguments(model: Model, vocabulary: int) -> dict[str, Any]:
    """Megatron's arguments by name for this model with `vocabulary` embedding rows."""
    # attention is full in Megatron: it refuses sequences that are longer than the window
    positions = min(model.positions, model.window or model.positions)
    arguments = {
        "num_layers": model.layers, "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_size, "num_attention_heads": model.heads,
        "group_query_attention": model.groups != model.heads, "kv_channels": model.head_size,
        "max_position_embeddings": positions, "padded_vocab_size": vocabulary,
        "normalization": "RMSNorm", "layernorm_epsilon": model.epsilon, "swiglu": True,
        "add_bias_linear": False, "add_qkv_bias": model.qkv_bias, "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tied,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, **model.rope.flags(),
    }  # fmt: skip
    if model.groups != model.heads:
        arguments["num_query_groups"] = model.groups
    if model.experts:
        arguments |= {
            "num_experts": model.experts, "moe_router_topk": model.top_k,
            "moe_ffn_hidden_size": model.ffn_size,
            # softmax over the chosen experts alone sums to 1; over all of them it doesn't
            "moe_router_pre_softmax": not model.normalised,
        }  # fmt: skip
    return arguments


# Arguments whose flag isn't "--" and the name, and flags that mean False.
_OPTIONS = {
    "layernorm_epsilon": "--norm-epsilon",
    "add_bias_linear": "--disable-bias-linear",
    "yarn_correction_range_round_to_int": "--no-yarn-correction-range-round-to-int",
}
_NEGATIVE = ("add_bias_linear", "yarn_correction_range_round_to_int")


def command_line(arguments: Mapping[str, Any]) -> str:
    """The same arguments as flags for Megatron's command line."""
    words: list[str] = []
    for name, value in arguments.items():
        option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
        if isinstance(value, bool):
            words += [option] if value != (name in _NEGATIVE) else []
        else:
            words += [option, str(value)]
    return shlex.join(words)


# May differ between a checkpoint and the configuration it came with.
_FREE = ("max_position_embeddings", "attention_dropout", "hidden_dropout", "padded_vocab_size")
# What a model without them has.
_ABSENT = {
    "use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None, "num_experts": None,
}  # fmt: skip


def check_agreement(model: Model, arguments: Mapping[str, Any]) -> None:
    """That a Megatron checkpoint was trained as the model that its config.json describes.

    Raises:
        ValueError: the first argument that differs, by name.
    """
    for name, value in (_ABSENT | megatron_arguments(model, 0)).items():
        if name in _FREE or name not in arguments:
            continue
        found = arguments[name]
        known = found is None or isinstance(found, bool | int | float | str)
        if not known or found != value and not (found is None and value is False):
            raise ValueError(
                f"the checkpoint has {name} {found!r}, but its config.json means {value!r}."
            )
