"""LoRA's dials: what is refused, and which names are targets."""

from typing import Any

import pytest

from megatron_dr.config.lora import LoRAConfig


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rank": 0}, "rank must be at least 1, not 0."),
        ({"alpha": 0.0}, "alpha must be finite and above 0, not 0.0."),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0."),
        ({"targets": "linear_("}, "'linear_\\(' are no regular expression"),
    ],
)
def test_bad_dials_are_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**changes)


def test_targets_match_the_end_of_a_name_from_a_dot() -> None:
    name = "decoder.layers.12.self_attention.linear_qkv"
    for targets in ("linear_qkv", r"layers\.12\..*", "linear_fc1|linear_q.*", name):
        assert LoRAConfig(targets=targets).matches(name)
    for targets in ("qkv", "linear_q", r"layers\.1\..*", "self_attention"):
        assert not LoRAConfig(targets=targets).matches(name)
