"""`--dr-keep-best` and the target's test set, in Megatron's loop."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.loop import best
from megatron_dr.report import metrics

from ._train import cone, data, flags, run

__all__ = ["data"]

# a rate at which the model gets better and then worse
# so large a rate that the target is learnt by heart before the run ends
KEEPS = "--dr-keep-best --eval-interval 1 --save-interval 3 --lr 0.1 --clip-grad 0 --dr-alpha 0.05"


def validations(path: Path) -> dict[int, float]:
    return {one["iteration"]: one["target loss"] for one in metrics.read(path, "validation")}


def kept(folder: Path) -> tuple[int, dict[str, Any]]:
    """The only checkpoint in <save>/best, and what is said of it."""
    (path,) = (folder / "best").glob("iter_*")
    tracked = (folder / "best" / "latest_checkpointed_iteration.txt").read_text()
    assert path.name == f"iter_{int(tracked):07d}"
    return int(tracked), json.loads((folder / "best" / "best.json").read_text())


def test_the_best_is_kept_and_loaded(data: dict[str, str], tmp_path: Path) -> None:
    """Stopped and resumed: what is kept is the best of both parts, and validates as it did."""
    path, folder = tmp_path / "m.jsonl", tmp_path / "saved"
    more = f"{cone(data)} {KEEPS} --save {folder} --dr-metrics {path}"
    code, out, error = run(flags(data, f"{more} --exit-interval 3"))[0]
    assert code == 0, error
    first, said = kept(folder)
    assert said["target loss"] == min(validations(path).values()) and said["former"] is None
    code, out, error = run(flags(data, f"{more} --load {folder}"))[0]
    assert code == 0, error
    assert f"so far: {said['target loss']:.6g} of iteration {first}, kept in {folder}/best" in out
    found = validations(path)
    iteration, said = kept(folder)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[iteration] == said["target loss"] == min(found.values())
    assert iteration < 6 and (folder / "iter_0000006").is_dir()  # Megatron's own are as ever
    noted = metrics.read(path, "best")
    assert noted[-1] == {"kind": "best", "iteration": iteration, "target loss": found[iteration]}

    again = tmp_path / "again.jsonl"
    more = f"""{cone(data)} --load {folder}/best --finetune --no-load-optim --lr 0
        --dr-metrics {again} --eval-interval 1"""
    code, _, error = run(flags(data, more, 1))[0]
    assert code == 0, error
    assert validations(again)[1] == pytest.approx(found[iteration], rel=1e-6)


@pytest.mark.soak
def test_the_last_stage_tells_all_which_is_the_best(data: dict[str, str], tmp_path: Path) -> None:
    """Beside Megatron's own checkpoints."""
    path, folder = tmp_path / "m.jsonl", tmp_path / "saved"
    more = f"""{cone(data)} {KEEPS} --pipeline-model-parallel-size 2 --save {folder}
        --dr-metrics {path}"""
    code, _, error = run(flags(data, more, 4))[0]
    assert code == 0, error
    found = validations(path)
    iteration, said = kept(folder)
    assert found[iteration] == said["target loss"] == min(found.values())
    tracker = folder / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "4" and (folder / "iter_0000003").is_dir()


def test_the_last_validation_counts_and_the_test_set_comes_after(
    data: dict[str, str], tmp_path: Path
) -> None:
    """No look is due in so short a run but that at its end. The target's test set is all of it, the
    general one what Megatron makes of it."""
    path, folder = tmp_path / "m.jsonl", tmp_path / "saved"
    more = f"""{cone(data)} --dr-keep-best --eval-interval 100 --save {folder} --save-interval 50
        --dr-target-test-data {data["held_out"]} --test-data-path {data["general"]}
        --dr-metrics {path}"""
    code, out, error = run(flags(data, more, 2), 1)[0]
    assert code == 0, error
    assert kept(folder)[0] == 2
    (valid,) = metrics.read(path, "validation")
    (tested,) = metrics.read(path, "target test")
    (general,) = metrics.read(path, "test")
    assert tested["target test loss"] == pytest.approx(valid["target loss"], rel=1e-5)
    assert tested.keys() == {"kind", "iteration", "target test loss"}
    assert general.keys() == {"kind", "iteration", "lm loss", "validation seconds"}
    assert " target test set at iteration 2 | target test loss value: " in out


GIVEN = {"keep_best": True, "target_valid_data": "held_out.jsonl"}
ARGS = {"save": "runs/a", "eval_interval": 5, "eval_iters": 1, "skip_train": False}
REFUSED = [
    ({}, {"save": None}, "--dr-keep-best needs --save, the folder"),
    ({"target_valid_data": None}, {}, "--dr-keep-best needs --dr-target-valid-data, by which"),
    ({}, {"eval_interval": None}, "--dr-keep-best needs --eval-interval"),
    ({}, {"eval_iters": 0}, "--dr-keep-best needs validation"),
    ({}, {"full_validation": True}, "--full-validation needs --multiple-validation-sets"),
    ({}, {"multiple_validation_sets": True}, "--multiple-validation-sets needs --full-validation"),
    ({}, {"skip_train": True}, "--dr-keep-best is of a run that trains: drop it, or --skip-train."),
    (
        {"keep_best": False}, {"skip_train": True},
        "--dr-target-valid-data is of a run that trains: .* give its data as --valid-data-path",
    ),
    (
        {"keep_best": False, "target_valid_data": None, "metrics": "m.jsonl"}, {"skip_train": True},
        "--dr-metrics is of a run that trains: .* or have answers to write with --dr-generate",
    ),
    (
        {"keep_best": False, "target_test_data": "test.jsonl"}, {"eval_iters": 0},
        "--dr-target-test-data needs validation",
    ),
    ({"keep_best": False}, {"eval_iters": 0}, "--dr-target-valid-data needs validation"),
]  # fmt: skip


@pytest.mark.parametrize("changed, args, sentence", REFUSED)
def test_without_what_it_needs_it_is_refused(
    changed: dict[str, Any], args: dict[str, Any], sentence: str
) -> None:
    options = Namespace(**{**ARGS, "full_validation": False, "multiple_validation_sets": False})
    best.check(options, TargetConfig(**GIVEN))
    vars(options).update(args)
    with pytest.raises(ValueError, match=sentence):
        best.check(options, TargetConfig(**{**GIVEN, **changed}))


def test_a_crash_while_the_next_best_is_written(tmp_path: Path) -> None:
    """best.json tells what is known of the one that the tracker names."""
    (tmp_path / "iter_0000004").mkdir()
    (tmp_path / "iter_0000008").mkdir()
    former = {"iteration": 4, "target loss": 2.0}
    best._note(tmp_path, {"iteration": 8, "target loss": 1.0, "former": former})
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    assert best._read(tmp_path) == former
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    assert best._read(tmp_path) == {"iteration": 8, "target loss": 1.0}
    (tmp_path / "iter_0000008").rmdir()
    assert best._read(tmp_path) is None


def test_a_crash_after_the_next_best_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The run that is resumed removes the one before, and says the new one where its step runs
    again, once."""
    monkeypatch.setattr(best.collectives, "of_all_ranks", lambda value: [value])
    monkeypatch.setattr(best.dist, "get_rank", lambda: 0)
    folder = tmp_path / "best"
    for iteration in (4, 8):
        (folder / f"iter_000000{iteration}").mkdir(parents=True)
    new = {"iteration": 8, "target loss": 1.0}
    best._note(folder, {**new, "former": {"iteration": 4, "target loss": 2.0}})
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    one = best.Best(Namespace(save=str(tmp_path)), "target loss", False, lambda *_: None)
    assert one.known == new
    assert kept(tmp_path) == (8, {**new, "former": None})
    one.see(8, {"target loss": 1.0})
    said = [one.save(iteration, train_data_iterator=None) for iteration in (7, 8, 8)]
    assert said == [None, new, None]


@pytest.mark.parametrize("higher", [False, True])
def test_what_is_better(higher: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Strictly; what is not finite never is."""
    monkeypatch.setattr(best.collectives, "of_all_ranks", lambda value: [value])
    monkeypatch.setattr(best.dist, "get_rank", lambda: 0)
    one = best.Best(Namespace(save=str(tmp_path)), "value", higher, lambda *_: None)
    found = []
    for iteration, value in enumerate((float("nan"), 2.0, 1.0, 1.0, 3.0, float("inf"), 3.0)):
        one._new = None
        one.see(iteration, {"value": value, "other": 0.0})
        one.known = one._new or one.known
        found += [value] if one._new else []
    assert found == ([2.0, 3.0] if higher else [2.0, 1.0])
    one._new = None
    one.see(9, {})
    assert one._new is None
