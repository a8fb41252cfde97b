"""Rotary positions: from a Hugging Face configuration to Megatron's flags, exactly or not at all.

Megatron-Core 0.19 knows these (megatron/core/models/common/embeddings):

| rope_type | frequency of pair i of d/2 | Megatron's flags |
|---|---|---|
| default | f_i = base^(-2i/d) | `--rotary-base` |
| linear | f_i / factor | `--rotary-seq-len-interpolation-factor`, an integer |
| llama3 | f_i / factor below one wavelength, f_i above another, blended between | `--use-rope-scaling`, `--rope-scaling-factor`; the wavelengths are fixed at 8192 / 1 and 8192 / 4 |
| yarn | blended between f_i / factor and f_i by beta_fast and beta_slow; q and k times a factor | `--position-embedding-type yarn`, `--yarn-*`, `--mscale` |

What those flags can't say is refused.
"""  # noqa: E501

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dr.hf.fields import need, number, switch, table, whole

_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate",
        "attention_factor", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip
_MAY_BE_0 = ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")  # as if left out
_LENGTH = "original_max_position_embeddings"
_NEEDED = {"linear": ("factor",), "llama3": _KNOWN["llama3"], "yarn": ("factor",)}
# fixed in megatron.core's RotaryEmbedding._apply_scaling
_LLAMA3 = {
    "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model: their kind, base and the kind's own parameters."""

    kind: str
    base: float
    parameters: Mapping[str, Any]

    def flags(self) -> dict[str, Any]:
        """Megatron's arguments by name."""
        flags = {
            "position_embedding_type": "yarn" if self.kind == "yarn" else "rope",
            "rotary_base": _whole("rope_theta", self.base),
            "rotary_percent": 1.0,
        }
        kinds = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
        return flags | kinds[self.kind](self.parameters) if self.kind in kinds else flags


def read_rope(config: Mapping[str, Any], default_base: float) -> Rope:
    """The rotary positions of a config.json of transformers 4 (`rope_scaling`) or 5.

    Raises:
        ValueError: a kind or a parameter that Megatron can't reproduce.
    """
    found = table(config, "rope_scaling") | table(config, "rope_parameters")
    kind = str(found.pop("rope_type", found.pop("type", "default")))
    base = found.pop("rope_theta", config.get("rope_theta"))
    base = default_base if base is None else number({"rope_theta": base}, "rope_theta")
    partial = found.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"config.json: partial_rotary_factor {partial} can't be converted.")
    if kind not in _KNOWN:
        raise ValueError(
            f"config.json: rope_type {kind!r} can't be converted; known are {', '.join(_KNOWN)}."
        )
    for name in found:
        if name not in _KNOWN[kind] and found[name] is not None:
            raise ValueError(f"config.json: {name!r} is no parameter of rope_type {kind!r}.")
    if kind == "yarn" and found.get(_LENGTH) is None:
        found[_LENGTH] = config.get(_LENGTH) or need(config, "max_position_embeddings")
    for name in _NEEDED.get(kind, ()):
        if found.get(name) is None:
            raise ValueError(f"config.json: rope_type {kind!r} needs {name!r}.")
    for name in found:
        _check(found, name)
    rope = Rope(kind, float(base), found)
    rope.flags()  # refuses what can't be said in them
    return rope


def _check(parameters: Mapping[str, Any], name: str) -> None:
    """That a parameter is a number, but for the one that is a switch."""
    found = parameters[name]
    if name == "truncate":
        switch(parameters, name, True)
    elif name == _LENGTH:
        whole(parameters, name)
    elif found is not None and not (found == 0 and name in _MAY_BE_0):
        number(parameters, name)


def _whole(name: str, value: float) -> int:
    if float(value) != int(value):
        raise ValueError(f"config.json: {name} {value} is no integer, as Megatron needs.")
    return int(value)


def _linear(parameters: Mapping[str, Any]) -> dict[str, Any]:
    factor = _whole("the linear rope factor", parameters["factor"])
    return {"rotary_seq_len_interpolation_factor": factor}


def _llama3(parameters: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in _LLAMA3.items():
        if parameters[name] != value:
            raise ValueError(
                f"config.json: {name} {parameters[name]} can't be converted: Megatron has {value}."
            )
    return {"use_rope_scaling": True, "rope_scaling_factor": float(parameters["factor"])}


def _yarn(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron multiplies q and k by m(mscale) / m(mscale_all_dim), m(x) = 1 + 0.1 x ln(factor)."""
    factor = float(parameters["factor"])
    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not (scale and scale_all):  # as in transformers: both, or neither counts
        scale, scale_all = 1.0, 0.0
    attention = parameters.get("attention_factor")
    if attention is not None:
        if factor <= 1 and attention != 1:
            raise ValueError(
                f"config.json: yarn's attention_factor {attention} can't be converted at factor "
                f"{factor}."
            )
        scale = (attention - 1) / (0.1 * math.log(factor)) if factor > 1 else 1.0
        scale_all = 0.0
    truncate = parameters.get("truncate")
    return {
        "rotary_scaling_factor": factor,
        "yarn_original_max_position_embeddings": parameters["original_max_position_embeddings"],
        "yarn_beta_fast": float(parameters.get("beta_fast") or 32),
        "yarn_beta_slow": float(parameters.get("beta_slow") or 1),
        "yarn_correction_range_round_to_int": truncate is None or bool(truncate),
        "mscale": float(scale), "mscale_all_dim": float(scale_all),
    }  # fmt: skip
