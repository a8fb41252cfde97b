"""Training by a reward model through Megatron's loop: its scores are those of single texts."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_dr.report import metrics
from megatron_dr.rl import experience
from tests.rl import _reward_model as made

from . import _rl
from ._ranks import run_ranks
from ._train import ROOT

CONTEXT = 256  # tokens of the reward model: no text is cut


def run(data: dict[str, str], more: str, steps: int, world: int) -> Any:
    rl = _rl.RL.replace(f"--dr-rl-reward {_rl.REWARD}", "")
    argv = f"{rl} --data-path {data['general']} --train-iters {steps} {more}".split()
    return run_ranks(world, _rl._run, argv)


def expected_rewards(model: Any, saved: experience.Experience) -> list[float]:
    """Of each saved completion, alone: the policy's tokens as text, then the reward model's."""
    policy = transformers.AutoTokenizer.from_pretrained(ROOT / "examples/sft/tokenizer")
    rewards = []
    for ids, next_is_answer in zip(
        saved.tokens_NT.tolist(), saved.mask_NT.bool().tolist(), strict=True
    ):
        first = next_is_answer.index(True) + 1
        prompt, answer = ids[:first], ids[first : first + sum(next_is_answer)]
        if answer[-1] == policy.eos_token_id:
            answer.pop()
        text = policy.decode(prompt) + policy.decode(answer)
        rewards.append(made.expected(model, [1, *made.encode(text)]))
    return rewards


@pytest.mark.soak
def test_ranks_share_the_scoring(tmp_path: Path) -> None:
    data = _rl.write_prompts(tmp_path)
    model = made.llama(tmp_path / "reward", max_position_embeddings=CONTEXT)
    logged = []
    for world in (1, 2):
        path, save = tmp_path / f"{world}.jsonl", tmp_path / f"save{world}"
        more = f"--dr-rl-reward-model {tmp_path / 'reward'} --save {save} --dr-metrics {path}"
        _rl.parameters(run(data, more, 2, world))
        logged.append(metrics.read(path, "train"))
        saved = experience.load(save / "dr_rollouts/iter_0000002.safetensors")[0]["general"]
        rewards = expected_rewards(model, saved)
        assert max(rewards) - min(rewards) > 0.1
        assert saved.reward_N.tolist() == pytest.approx(rewards, abs=1e-5)
        assert logged[-1][0]["reward"] == pytest.approx(sum(rewards) / 16, abs=1e-5)
    one, two = logged
    assert len(one) == len(two) == 2
    for first, second in zip(one, two, strict=True):
        for name in ("reward", "policy loss", "kl"):
            assert first[name] == pytest.approx(second[name], rel=2e-3, abs=2e-5), name
        assert first["failed rewards"] == second["failed rewards"] == 0


BAD = {
    "no folder": ("--dr-rl-reward-model {tmp}/none", "none: no such folder; a reward model is"),
    "both": (
        "--dr-rl-reward-model {tmp} --dr-rl-reward tests.mcore._rewards:vowels",
        "or --dr-rl-reward-model DIR, and not both.",
    ),
}


@pytest.mark.parametrize("more, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_at_start(tmp_path: Path, more: str, sentence: str) -> None:
    data = _rl.write_prompts(tmp_path)
    (first, _, error, _), (second, _, other, _) = run(data, more.format(tmp=tmp_path), 1, 2)
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and sentence in said[0], (said, error[-2000:])
    assert "megatron_dr: error" not in other
    assert first == second == 2
