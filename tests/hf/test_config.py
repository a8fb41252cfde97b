"""config.json to Megatron's flags; what can't be said in them is refused in one sentence."""

from typing import Any

import pytest

from megatron_dr.hf.config import check_agreement, command_line, megatron_arguments, parse

from ._shapes import config

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def flags(architecture: str = "LlamaForCausalLM", **more: Any) -> str:
    return command_line(megatron_arguments(parse(config(architecture, 0, **more)), 128))


def test_llama_3_2() -> None:
    found = flags(
        rope_scaling=LLAMA3, rope_theta=500000.0, tie_word_embeddings=True, head_dim=64,
        num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
    )  # fmt: skip
    for words in (
        "--group-query-attention", "--num-query-groups 8", "--kv-channels 64", "--swiglu",
        "--norm-epsilon 1e-05", "--rotary-base 500000", "--use-rope-scaling",
        "--rope-scaling-factor 32.0", "--disable-bias-linear", "--padded-vocab-size 128",
    ):  # fmt: skip
        assert words in found
    for words in ("--untie", "--add-qkv-bias", "--qk-layernorm", "--num-experts"):
        assert words not in found


def test_qwen() -> None:
    assert "--add-qkv-bias" in flags("Qwen2ForCausalLM")
    third = flags("Qwen3ForCausalLM", head_dim=None)
    assert "--qk-layernorm" in third and "--kv-channels 128" in third
    assert "--add-qkv-bias" not in third


def test_experts() -> None:
    mixtral = flags("MixtralForCausalLM", num_local_experts=8)
    assert "--num-experts 8 --moe-router-topk 2" in mixtral
    assert "--moe-router-pre-softmax" not in mixtral and "--rotary-base 1000000" in mixtral
    for normalised in (True, False):
        qwen = flags("Qwen3MoeForCausalLM", norm_topk_prob=normalised)
        assert ("--moe-router-pre-softmax" in qwen) is not normalised


@pytest.mark.parametrize("style", ["transformers 4", "transformers 5"])
def test_rope_of_both_styles(style: str) -> None:
    for rope in (LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}):
        if style == "transformers 4":
            more = {"rope_scaling": rope, "rope_theta": 1e6, "rope_parameters": None}
        else:
            more = {"rope_parameters": rope | {"rope_theta": 1e6}}
        found = parse(config("LlamaForCausalLM", 0, **more)).rope
        assert (found.kind, found.base) == (rope["rope_type"], 1e6)
        assert found.flags()["rotary_base"] == 1000000


def test_old_name_of_the_rope_type() -> None:
    rope = {"type": "linear", "factor": 4}
    assert "--rotary-seq-len-interpolation-factor 4" in flags(rope_scaling=rope)


def test_yarn() -> None:
    found = flags(rope_scaling=YARN)
    for words in (
        "--position-embedding-type yarn", "--rotary-scaling-factor 4.0", "--yarn-beta-fast 32.0",
        "--yarn-original-max-position-embeddings 32768", "--mscale 1.0 --mscale-all-dim 0.0",
    ):  # fmt: skip
        assert words in found
    loose = flags(rope_scaling=YARN | {"truncate": False})
    assert "--no-yarn-correction-range-round-to-int" in loose
    assert "round-to-int" not in found


def test_a_sliding_window_limits_the_length() -> None:
    for name, more, length in (
        ("MistralForCausalLM", {"sliding_window": 32}, 32),
        ("MistralForCausalLM", {"sliding_window": None}, 64),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": False}, 64),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": True}, 32),
    ):
        assert f"--max-position-embeddings {length} " in flags(name, **more)


REFUSED = {
    "architecture": ({"architectures": ["GemmaForCausalLM"]}, "architecture GemmaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture unnamed"),
    "rope type": ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type 'dynamic'"),
    "rope parameter": ({"rope_scaling": LLAMA3 | {"foo": 1}}, "'foo' is no parameter"),
    "rope incomplete": ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "needs 'low_freq"),
    "wavelengths": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2}}, "low_freq_factor 2"),
    "linear 2.5": ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "2.5 is no integer"),
    "base": ({"rope_theta": 10000.5}, "rope_theta 10000.5 is no integer"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "bias": ({"attention_bias": True}, "attention_bias True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias True"),
    "missing": ({"hidden_size": None}, "'hidden_size' is missing"),
    "groups": ({"num_attention_heads": 5, "num_key_value_heads": 2}, "5 heads can't be"),
}


@pytest.mark.parametrize("more, sentence", REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_one_sentence(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:
        flags(**more)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_mixed_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="layers with and without experts"):
        flags("Qwen3MoeForCausalLM", mlp_only_layers=[0])


def test_a_checkpoint_trained_otherwise_is_not_exported() -> None:
    model = parse(config("LlamaForCausalLM", 0, rope_theta=500000.0))
    right = megatron_arguments(model, 999)
    check_agreement(model, right)
    check_agreement(model, right | {"num_experts": None, "use_rope_scaling": False})
    for name, value in (
        ("rotary_base", 10000), ("use_rope_scaling", True), ("qk_layernorm", True),
        ("rotary_seq_len_interpolation_factor", 2), ("layernorm_epsilon", 1e-5), ("num_experts", 8),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"has {name} "):
            check_agreement(model, right | {name: value})
