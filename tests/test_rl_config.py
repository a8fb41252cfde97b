"""The configuration of training by rewards refuses what is out of range, by its flag's name."""

from typing import Any

import pytest

from megatron_dr.config.rl import RLConfig

REWARD = "megatron_dr.rl.rewards:numeric"

PPO: dict[str, Any] = {"algorithm": "ppo"}
OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    ({"reward": None}, "needs --dr-rl-reward"),
    ({"group": 1}, "--dr-rl-group must be at least 2"),
    ({"prompts": 0}, "--dr-rl-prompts must be at least 1"),
    ({"target_refresh": 0}, "--dr-rl-target-refresh must be at least 1"),
    ({"clip": 0.0}, "--dr-rl-clip must be finite and above 0"),
    ({"temperature": float("nan")}, "--dr-rl-temperature must be finite"),
    ({"kl": -0.1}, "--dr-rl-kl must be finite and at least 0"),
    ({"top_p": 0.0}, r"--dr-rl-top-p must be in \(0, 1\]"),
    ({"stop": ""}, "--dr-rl-stop must not be empty"),
    ({"top_k": -1}, "--dr-rl-top-k must be at least 0"),
    ({"min_tokens": -1}, "--dr-rl-min-tokens must be from 0 to --dr-rl-max-tokens 256, not -1"),
    ({"max_tokens": 4, "min_tokens": 5}, "from 0 to --dr-rl-max-tokens 4, not 5"),
    (
        {"min_tokens": 1, "stop": "x"},
        "can't keep a text from being written: drop it, or --dr-rl-st",
    ),
    ({"discount": 0.9}, "--dr-rl-discount has no meaning with --dr-rl-algorithm grpo"),
    ({"kl_target": 6.0}, "--dr-rl-kl-target has no meaning with --dr-rl-algorithm grpo"),
    (
        {"kl_estimator": "k1"},
        "k1 has on average no gradient, .* loss of --dr-rl-algorithm grpo: gi",
    ),
    (PPO | {"kl_estimator": "k2", "kl": 0.0}, "has no meaning with --dr-rl-kl 0: drop it"),
    (PPO | {"discount": 1.1}, r"--dr-rl-discount must be in \[0, 1\]"),
    (PPO | {"gae_decay": float("nan")}, r"--dr-rl-gae-decay must be in \[0, 1\]"),
    (PPO | {"value_weight": 0.0}, "--dr-rl-value-weight must be finite and above 0"),
    (PPO | {"value_clip": -1.0}, "--dr-rl-value-clip must be finite and above 0"),
    (PPO | {"kl_target": 0.0}, "--dr-rl-kl-target must be finite and above 0"),
    (PPO | {"kl_horizon": 0}, "--dr-rl-kl-horizon must be at least 1"),
    (PPO | {"kl_target": 6.0, "kl": 0.0}, "steers --dr-rl-kl, which must then be above 0"),
]


@pytest.mark.parametrize("values, sentence", OUT_OF_RANGE)
def test_out_of_range(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RLConfig(**{"reward": REWARD} | values)


def test_a_value_head_needs_no_group() -> None:
    assert RLConfig(reward=REWARD, **PPO, group=1, kl_target=6.0).kl_of_loss == 0.0
    assert RLConfig(reward=REWARD, kl=0.1).kl_of_loss == 0.1


def test_steps_of_a_cycle_come_out_even() -> None:
    rl = RLConfig(reward=REWARD, prompts=4, group=6, epochs=2)
    assert rl.completions == 24 and rl.steps_per_cycle(16) == 3
    with pytest.raises(ValueError, match="= 48 is not a multiple of --global-batch-size 32"):
        rl.steps_per_cycle(32)
