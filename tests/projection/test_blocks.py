"""Names to blocks."""

import pytest

from megatron_dr.projection import UNPROJECTED, block_of

LAYERS = {
    "decoder.layers.3.self_attention.linear_qkv.weight": "decoder.layers.3",
    "decoder.layers.13.mlp.experts.local_experts.5.linear_fc1.weight": "decoder.layers.13",
    "mtp.layers.0.transformer_layer.mlp.linear_fc1.weight": "mtp.layers.0",
    "embedding.word_embeddings.weight": "embedding.word_embeddings",
    "decoder.final_layernorm.weight": "decoder.final_layernorm",
    "decoder.final_layernorm.bias": "decoder.final_layernorm",
    "output_layer.weight": "output_layer",
    "scale": "scale",
}


@pytest.mark.parametrize("name, layer", LAYERS.items())
def test_block_of(name: str, layer: str) -> None:
    assert block_of(name, "layer") == layer
    assert block_of(name, "matrix") == name
    assert block_of(name, "model") == "model"


@pytest.mark.parametrize("kind", ["model", "layer", "matrix"])
def test_a_value_head_is_a_block_that_is_not_projected(kind: str) -> None:
    for name in ("value_head.weight", "value_head.bias"):
        assert block_of(name, kind) == UNPROJECTED
    assert block_of("decoder.value_head.weight", kind) != UNPROJECTED


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="block kind is 'head'"):
        block_of("output_layer.weight", "head")
