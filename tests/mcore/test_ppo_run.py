"""PPO through Megatron's loop: its log, resume, what it learns, rewards that fail."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.report import metrics
from megatron_dr.rl import experience

from . import _rl

Data = dict[str, Any]
HEAD = ("value_head.weight", "value_head.bias")
STEPS, STOP = 6, 3  # the second cycle's first half; a stop in the middle of the first


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Prompts, and a checkpoint of a run without a value head."""
    folder = tmp_path_factory.mktemp("ppo")
    found: Data = _rl.write_prompts(folder)
    found["base"] = folder / "base"
    found["start"] = _rl.parameters(_rl.run(found, f"--save {found['base']}", 1))
    return found


def run(data: Data, path: Path, more: str, steps: int, world: int = 1, begin: bool = True) -> Any:
    """Parameters at the end, and what was logged."""
    load = f"--load {data['base']} --finetune --no-load-optim" if begin else ""
    flags = f"--dr-rl-algorithm ppo --dr-metrics {path} {load} {more}"
    weights = _rl.parameters(_rl.run(data, flags, steps, world))
    return weights, metrics.read(path, "train")


def regularised(data: Data, slots: int = 8) -> str:
    """With one sequence in a row, rows don't depend on the number of data ranks."""
    return f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-slots {slots}
        --dr-set cone --dr-blocks layer --dr-rl-kl-target 0.01 --dr-rl-kl-horizon 32"""


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of one process."""
    path = tmp_path_factory.mktemp("whole") / "metrics.jsonl"
    return run(data, path, regularised(data), STEPS)


def same(found: Any, whole: Any, first: int = 0) -> None:
    (weights, lines), (expected, expected_lines) = found, whole
    names = [n for n in expected_lines[0] if n.split()[0] not in ("kind", "dr", "step")]
    assert len(lines) == STEPS - first
    for got, want in zip(lines, expected_lines[first:], strict=True):
        for name in names:
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=5e-5), (name, got, want)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_begins_without_a_head_and_logs(whole: Any, data: Data) -> None:
    weights, lines = whole
    assert weights.keys() - data["start"].keys() == set(HEAD)
    assert all(weights[name].any() for name in HEAD)
    first, *_, last = lines
    assert len(lines) == STEPS and {"value loss", "return", "kl weight"} <= first.keys()
    assert "target value loss" not in first and "target policy loss" in first
    assert first["value"] == 0 and last["value"] != 0  # the head begins at 0
    # no KL at first, 16 completions of a horizon of 32: half of a fifth less
    assert first["kl of a completion"] == pytest.approx(0, abs=1e-6)
    assert first["kl weight"] == pytest.approx(0.04)
    assert last["kl weight"] == pytest.approx(0.04 * (1 - 0.2 * 16 / 32), rel=1e-4)


@pytest.mark.soak
def test_resume_in_the_middle_of_a_cycle_and_in_another_layout(
    data: Data, whole: Any, tmp_path: Path
) -> None:
    """The head, the rollout's values and the KL's weight come back."""
    save = f"{regularised(data)} --save {tmp_path}"
    run(data, tmp_path / "a.jsonl", f"{save} --exit-interval {STOP}", STEPS)
    more = f"{save} --load {tmp_path} --tensor-model-parallel-size 2 --sequence-parallel"
    same(run(data, tmp_path / "b.jsonl", more, STEPS, 2, begin=False), whole, STOP)
    kept, _ = experience.load(tmp_path / f"dr_rollouts/iter_000000{STOP}.safetensors")
    general, target = kept["general"].return_NT, kept["target"].return_NT
    assert general is not None and not general.isnan().any()
    assert target is not None and target.isnan().all()  # its loss has no value part


@pytest.mark.soak
def test_ranks_share_the_work_with_overlap(data: Data, whole: Any, tmp_path: Path) -> None:
    more = f"{regularised(data, 4)} --overlap-grad-reduce --overlap-param-gather"
    same(run(data, tmp_path / "a.jsonl", more, STEPS, 2), whole)


def test_the_head_learns_a_return(data: Data, tmp_path: Path) -> None:
    """Every completion has the reward 0.5: so has every token's return."""
    more = """--dr-rl-reward tests.mcore._rewards:equal --dr-rl-kl 0 --dr-rl-value-weight 1
        --dr-rl-prompts 16 --dr-rl-group 1 --dr-rl-epochs 4"""
    _, lines = run(data, tmp_path / "a.jsonl", more, 33)
    first, last = lines[0], lines[-1]
    assert first["value loss"] == pytest.approx(0.5 * 0.5**2, rel=0.3)
    assert last["value loss"] < 0.05 * first["value loss"]
    assert abs(last["value"] - 0.5) < 0.1 and abs(last["return"] - 0.5) < 0.1
    assert all(torch.tensor(list(line.values())[1:]).isfinite().all() for line in lines)


def test_without_rewards_nothing_is_learned(data: Data, tmp_path: Path) -> None:
    more = "--dr-rl-reward tests.mcore._rewards:raises --weight-decay 0"
    weights, lines = run(data, tmp_path / "a.jsonl", more, 2)
    for line in lines:
        assert line["policy loss"] == line["value loss"] == 0 and line["failed rewards"] == 16
    for name, value in weights.items():
        assert torch.equal(value, data["start"].get(name, torch.zeros_like(value))), name


@pytest.mark.soak
def test_failed_rewards_cost_their_samples_alone(data: Data, tmp_path: Path) -> None:
    """With adapters, sample rows, and the rollout as its own target, whose checkpoint it keeps."""
    more = f"""--dr-rl-reward tests.mcore._rewards:raises_sometimes --dr-rl-target self
        --dr-rl-target-loss train-loss --dr-rows sample --micro-batch-size 2 --dr-lora-rank 2
        --save {tmp_path}"""
    weights, lines = run(data, tmp_path / "a.jsonl", more, 2, 2)
    assert 0 < lines[0]["failed rewards"] < 16 and lines[0]["value loss"] > 0
    assert all(torch.tensor(list(line.values())[1:]).isfinite().all() for line in lines)
    assert all(weights[name].any() for name in HEAD)
    assert all(".lora_" in name for name in weights.keys() - set(HEAD))
