"""Training by rewards through Megatron's loop: layouts, resume, rewards that fail, bad input."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.report import metrics

from . import _rl
from ._pairs import some
from ._rl import SAME, Data, data, from_base, regularised

__all__ = ["data"]

STEPS, STOP = 6, 3  # the second cycle's first half; a stop in the middle of the first


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of one process: its parameters, what it logged, what it said."""
    path = tmp_path_factory.mktemp("whole") / "metrics.jsonl"
    more = f"{regularised(data)} {from_base(data)} --dr-metrics {path}"
    ended = _rl.run(data, more, STEPS)
    weights = _rl.parameters(ended)
    return weights, metrics.read(path, "train"), metrics.read(path, "validation"), ended[0][1]


def compare(ended: Any, path: Path, whole: Any, first: int = 0) -> None:
    weights, expected = _rl.parameters(ended), whole[1][first:]
    found = metrics.read(path, "train")
    assert [line["iteration"] for line in found] == [line["iteration"] for line in expected]
    for got, want in zip(found, expected, strict=True):
        for name in SAME:
            assert got[name] == pytest.approx(want[name], rel=2e-3, abs=2e-5), (got, want)
    assert weights.keys() == whole[0].keys() and weights
    for name, value in weights.items():
        torch.testing.assert_close(value, whole[0][name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_run_logs_and_validates(whole: Any, data: Data) -> None:
    weights, trained, validated, out = whole
    first, *_, last = trained
    assert first["clipped"] == 0  # the ratio is 1 at a cycle's first step
    assert len(trained) == STEPS and first["kl"] == pytest.approx(0, abs=1e-9) and last["kl"] > 0
    assert len({line["reward"] for line in trained}) == 2  # two rollouts
    assert all(line["failed rewards"] == 0 and 0 < line["response length"] <= 6 for line in trained)
    assert {line["iteration"] for line in validated} == {3, 6}
    assert all("reward" in line and "target reward" in line for line in validated)
    assert "validation loss at iteration 3 | reward value" in out
    assert any((weights[name] - data["start"][name]).abs().max() > 1e-3 for name in weights)


LAYOUTS = {
    "dp2": ("--overlap-grad-reduce --overlap-param-gather", 2, 4),
    "tp2_sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2, 8),
    "pp2": ("--pipeline-model-parallel-size 2", 2, 8),
    "pp2_vpp2": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        2,
        8,
    ),
}


@pytest.mark.parametrize("layout, world, slots", some(LAYOUTS, "tp2_sp"))
def test_layouts_train_alike(
    data: Data, whole: Any, tmp_path: Path, layout: str, world: int, slots: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    more = f"{regularised(data, slots)} {from_base(data)} {layout} --dr-metrics {path}"
    compare(_rl.run(data, more, STEPS, world), path, whole)


def test_resume_in_the_middle_of_a_cycle_and_in_another_layout(
    data: Data, whole: Any, tmp_path: Path
) -> None:
    """The rollouts under way and the reference come back; nothing is sampled again."""
    folder, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    common = f"{regularised(data)} --save {folder}"
    _rl.parameters(_rl.run(data, f"{common} {from_base(data)} --exit-interval {STOP}", STEPS))
    more = f"{common} --load {folder} --dr-metrics {path} --tensor-model-parallel-size 2"
    compare(_rl.run(data, more, STEPS, 2), path, whole, first=STOP)
    assert sorted(p.name for p in (folder / "dr_rollouts").iterdir()) == [
        "iter_0000003.safetensors", "iter_0000006.safetensors",
    ]  # fmt: skip


def test_auto_counts_completions_and_not_prompts(data: Data, tmp_path: Path) -> None:
    """n: one cycle's target rollout, of 2 prompts with 4 completions; b: 4; two steps."""
    path = tmp_path / "metrics.jsonl"
    more = f"{regularised(data)} --dr-alpha-style auto --dr-metrics {path}"
    _rl.run(data, f"{more} {from_base(data)}", 2)
    rates = [line["learning rate"] for line in metrics.read(path, "train")]
    for line in metrics.read(path, "train"):
        assert line["dr E"] == pytest.approx(4 / 8 * sum(rates) / max(rates))
        assert line["dr alpha"] > 0


@pytest.mark.parametrize("reward", ["equal", "raises"])
def test_without_differences_of_reward_nothing_is_learned(
    data: Data, tmp_path: Path, reward: str
) -> None:
    """Equal rewards, or none: the policy's gradient is zero, and not NaN."""
    path = tmp_path / "metrics.jsonl"
    more = f"""{from_base(data)} --dr-rl-reward tests.mcore._rewards:{reward} --dr-rl-kl 0
        --weight-decay 0 --dr-metrics {path}"""
    weights = _rl.parameters(_rl.run(data, more, 2))
    for line in metrics.read(path, "train"):
        assert line["policy loss"] == 0 and line["failed rewards"] == 16 * (reward == "raises")
        assert line["reward"] == 0.5 * (reward == "equal")
    for name, value in weights.items():
        assert torch.equal(value, data["start"][name]), name


@pytest.mark.soak
def test_failed_rewards_cost_their_samples_alone(data: Data, tmp_path: Path) -> None:
    """On two ranks that share the work, with sample rows and the rollout as its own target."""
    path = tmp_path / "metrics.jsonl"
    more = f"""{from_base(data)} --dr-rl-reward tests.mcore._rewards:raises_sometimes
        --dr-rl-target self --dr-rows sample --micro-batch-size 2 --dr-metrics {path}
        --save {tmp_path}"""
    _rl.parameters(_rl.run(data, more, 2, 2))
    first, second = metrics.read(path, "train")
    assert 0 < first["failed rewards"] < 16 and first["reward"] > 0
    assert first["policy loss"] != 0 and second["policy loss"] != first["policy loss"]
    assert all(torch.tensor(list(line.values())[2:]).isfinite().all() for line in (first, second))


LONG = '{"prompt": "good"}\n{"prompt": "The fear of the Lord is the start of it all."}\n'
BAD = {
    "long prompt": ("--data-path {tmp}/long.jsonl", "long.jsonl:2: the prompt has 44 tokens"),
    "no prompt": ("--data-path {tmp}/none.jsonl", "none.jsonl: no such file or folder."),
    "steps": ("--dr-rl-group 3", "= 24 is not a multiple of --global-batch-size 16"),
    "reward": ("--dr-rl-reward nowhere:at_all", "reward 'nowhere:at_all' can't be loaded"),
    "target batch": (
        "--dr-rl-target self --dr-target-data {target}",
        "--dr-target-data has no meaning with --dr-rl-target self",
    ),
}


@pytest.mark.parametrize("more, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_at_start(
    data: Data, tmp_path: Path, more: str, sentence: str
) -> None:
    (tmp_path / "long.jsonl").write_text(LONG)
    flags = f"--global-batch-size 16 {more.format(tmp=tmp_path, **data)}"
    (first, _, error, _), (second, _, other, _) = _rl.run(data, flags, 1, 2)
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and sentence in said[0], (said, error[-2000:])
    assert "megatron_dr: error" not in other
    assert first == second == 2


WITHOUT = {
    "other flags": ("", "--dr-rl-epochs 4", "run with --dr-rl-epochs 2, and a cycle that is under"),
    "other reward": (
        "",
        "--dr-rl-reward tests.mcore._rewards:equal",
        "--dr-rl-reward tests.mcore._rewards:vowels, and this one has tests.mcore._rewards:equal, "
        "but the steps on a rollout of that run are not all done",
    ),
    "no rollouts": ("dr_rollouts", "", "is not of a run with --dr-rl-algorithm"),
    "no reference": ("dr_reference", "", "has no dr_reference"),
}


ON = "--override-opt-param-scheduler"  # a complete run has nothing to resume: it is made longer


@pytest.mark.parametrize("removed, more, sentence", WITHOUT.values(), ids=WITHOUT.keys())
def test_a_resume_without_what_it_needs_is_refused(
    data: Data, tmp_path: Path, removed: str, more: str, sentence: str
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(data["base"], folder, ignore=lambda _, names: {removed} & set(names))
    code, _, error, _ = _rl.run(data, f"--load {folder} {ON} {more}", 2)[0]
    assert code == 2 and sentence in error


def test_a_damaged_reference_is_refused(data: Data, tmp_path: Path) -> None:
    """It is a distributed checkpoint of its own, whose description is a pickle."""
    shutil.copytree(data["base"], tmp_path / "base")
    path = tmp_path / "base" / "dr_reference" / ".metadata"
    path.write_bytes(path.read_bytes()[:500])
    code, _, error, _ = _rl.run(data, f"--load {tmp_path / 'base'} {ON}", 2)[0]
    assert code == 2 and f"{path}: damaged, no metadata of a checkpoint" in error


def test_the_target_may_have_a_reward_of_its_own(data: Data, tmp_path: Path) -> None:
    """In its rollouts and on its held-out prompts."""
    path = tmp_path / "metrics.jsonl"
    own = "--dr-rl-target-reward tests.mcore._rewards:equal"
    more = f"{regularised(data)} {from_base(data)} {own} --dr-metrics {path} --eval-interval 1"
    _rl.parameters(_rl.run(data, more, 1))
    for kind in ("train", "validation"):
        (line, *_) = metrics.read(path, kind)
        assert line["target reward"] == 0.5 != line["reward"]
