"""`--dr-keep-best` and the target's test prompts where a run trains by rewards."""

import json
from pathlib import Path

import pytest

from megatron_dr.report import metrics

from . import _rl
from ._rl import Data, data

__all__ = ["data"]


@pytest.mark.soak
def test_the_greatest_reward_is_the_best(data: Data, tmp_path: Path) -> None:
    """And what lies beside checkpoints lies beside it: a run goes on from it."""
    path, folder = tmp_path / "m.jsonl", tmp_path / "saved"
    common = f"{_rl.regularised(data)} --dr-rl-kl 0.1 --eval-interval 1 --lr 0.1"
    more = f"""{common} {_rl.from_base(data)} --dr-keep-best --save {folder}
        --dr-target-test-data {data["held_out"]} --dr-metrics {path}"""
    _rl.parameters(_rl.run(data, more, 3))
    rewards = {v["iteration"]: v["target reward"] for v in metrics.read(path, "validation")}
    said = json.loads((folder / "best" / "best.json").read_text())
    assert len(rewards) == 3 and said["target reward"] == max(rewards.values())
    assert rewards[said["iteration"]] == said["target reward"]
    (tested,) = metrics.read(path, "target test")
    assert tested["target test reward"] == pytest.approx(rewards[3])
    iteration = said["iteration"]
    assert (folder / "best" / "dr_rollouts" / f"iter_{iteration:07d}.safetensors").is_file()
    again = tmp_path / "again.jsonl"
    more = f"{common} --load {folder}/best --override-opt_param-scheduler --dr-metrics {again}"
    _rl.parameters(_rl.run(data, more, 4))
    assert [line["iteration"] for line in metrics.read(again, "train")][0] == iteration + 1
