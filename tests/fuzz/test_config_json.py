"""config.json and a tokenizer's files, each a table that somebody else wrote."""

import tempfile
from pathlib import Path
from typing import Any

from megatron_dr.hf import config, vocabulary

from ._cases import Raw, damaged, dumped, fuzzed, refused, trees

_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "head_dim": 4, "hidden_act": "silu", "mlp_bias": False,
}  # fmt: skip
_SCALED = _LLAMA | {"rope_scaling": {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.1, "truncate": True,
}}  # fmt: skip
_LLAMA3 = _LLAMA | {"rope_parameters": {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 5e5, "partial_rotary_factor": 1.0,
}}  # fmt: skip
_LINEAR = _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}
_EXPERTS = _LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
    "use_sliding_window": True, "sliding_window": 32,
}  # fmt: skip
BASES = [_LLAMA, _SCALED, _LLAMA3, _LINEAR, _EXPERTS]


def read_model(case: Any) -> None:
    """What is accepted can be said in Megatron's flags."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_bytes(case if isinstance(case, bytes) else dumped(case))

        def read() -> None:
            model = config.read_model(path.parent)
            flags = config.megatron_arguments(model, config.padded_vocabulary(model, 2))
            assert config.command_line(flags)

        refused(read, path)


FAILED_CONFIGS = [
    _LLAMA | {"rope_theta": Raw("1" + "0" * 400)},
    _LINEAR | {"rope_scaling": {"type": "linear", "factor": Raw("1" + "0" * 400)}},
    _LLAMA | {"rms_norm_eps": Raw("1" + "0" * 400)},
    b"[" * 100_000, b"[]",
    _LLAMA | {"rope_theta": 10000.5}, _LLAMA | {"hidden_size": "16"},
    _LINEAR | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    _LLAMA3 | {"rope_parameters": _LLAMA3["rope_parameters"] | {
        "original_max_position_embeddings": 4096}},
]  # fmt: skip
test_model, test_model_long = fuzzed(
    read_model, trees(BASES) | damaged([dumped(base) for base in BASES]), 100, 4000, FAILED_CONFIGS
)

_NAMES = ("tokenizer.json", "added_tokens.json", "tokenizer_config.json",
          "special_tokens_map.json", "vocab.json")  # fmt: skip
_TOKENIZERS = [
    {
        "tokenizer.json": {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}},
            "added_tokens": [{"id": 2, "content": "<s>"}],
        },
        "tokenizer_config.json": {
            "added_tokens_decoder": {"2": {"content": "<s>"}}, "bos_token": "<s>",
            "extra_special_tokens": {"image": "<i>"}, "additional_special_tokens": ["<x>"],
        },
    },
    {
        "tokenizer.json": {"model": {"type": "Unigram", "vocab": [["a", -1.0], ["b", -2.0]]}},
        "special_tokens_map.json": {"eos_token": {"content": "</s>"}},
        "added_tokens.json": {"<y>": 3},
    },
    {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"</s>": 2}},
]  # fmt: skip


def read_vocabulary(case: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in _NAMES:
            held = case.get(name) if isinstance(case, dict) else case
            if held is not None:
                Path(folder, name).write_bytes(held if isinstance(held, bytes) else dumped(held))
        model = config.parse(_LLAMA)
        found = refused(lambda: vocabulary.size(Path(folder)), folder)
        if not found:
            refused(lambda: vocabulary.words(Path(folder), model, True), folder)


FAILED_VOCABULARIES = [
    {"tokenizer_config.json": {"extra_special_tokens": 5}, "vocab.json": {"a": 0}},
    {"tokenizer_config.json": {"added_tokens_decoder": {"9" * 5000: "a"}}},
]
test_vocabulary, test_vocabulary_long = fuzzed(
    read_vocabulary, trees(_TOKENIZERS), 80, 2000, FAILED_VOCABULARIES
)
