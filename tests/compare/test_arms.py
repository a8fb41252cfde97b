"""Arms as text, and the flags of the runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_dr.compare.arms import Arm, parse
from megatron_dr.compare.generated import Metrics, metrics, overlap
from megatron_dr.compare.plan import Plan, Start, check_flags, data_ranks
from megatron_dr.compare.splits import PARTS, Splits


@pytest.mark.parametrize(
    "name, flags, target, rows",
    [
        ("general", "--dr-set mean", False, False),
        ("target", "--dr-set target", True, False),
        ("mix:0.1", "--dr-set mean --dr-alpha 0.1", True, False),
        ("topk", "--dr-set topk --dr-alpha 0.05", True, True),
        ("topk:0.5", "--dr-set topk --dr-fraction 0.5 --dr-alpha 0.05", True, True),
        ("cone", "--dr-set cone --dr-alpha 0.05", True, True),
        ("cone:0", "--dr-set cone --dr-alpha 0", True, True),
        ("hull:0.2", "--dr-set hull --dr-alpha 0.2", True, True),
        ("auto", "--dr-set cone --dr-alpha-style auto", True, True),
        ("megatron_dr.projection:Span",
         "--dr-set megatron_dr.projection:Span --dr-alpha 0.05", True, True),
        ("megatron_dr.projection:Span:0.1",
         "--dr-set megatron_dr.projection:Span --dr-alpha 0.1", True, True),
    ],
)  # fmt: skip
def test_an_arm(name: str, flags: str, target: bool, rows: bool) -> None:
    assert parse(name) == [Arm(name, flags, target, rows)]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "--arms is empty"), ("mix", "mix:0.1"), ("mix:2", "alpha must be in"),
        ("cone,cone", "twice"), ("topk:0", "fraction must be in"), ("target:1", "no share"),
        ("nothing", "An arm is general, target, mix:ALPHA"), ("none:Here", "can't be loaded"),
    ],
)  # fmt: skip
def test_no_arm(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--seed", "1"], "--seed"), (["--dr-set=cone"], "--dr-set"),
        (["--dr-keep-best"], "--dr-keep-best"), (["more.jsonl"], "begin with"),
        (["--dr-rl-group", "8"], "--dr-rl-group"),
    ],
)  # fmt: skip
def test_flags_that_a_comparison_gives(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_flags(words)


def test_data_ranks() -> None:
    words = ["--lr", "1", "--tensor-model-parallel-size", "2"]
    assert data_ranks(words, 4) == 2 and data_ranks([], 4) == 4
    with pytest.raises(ValueError, match="--ranks 3 must be a multiple of the 2 ranks"):
        data_ranks(words, 3)


def plan(out: Path, *more: str, checkpoint: Path | None = None) -> Plan:
    files = {role: {part: out / f"{role} {part}.jsonl" for part in PARTS}
             for role in ("target", "general")}  # fmt: skip
    for path in (path for parts in files.values() for path in parts.values()):
        path.write_text(path.name)
    splits = Splits(files, {role: dict.fromkeys(PARTS, 8) for role in files}, [])
    return Plan(out, Start("--seq-length 64", checkpoint, "digest"), splits, 4, more, "cpu", 1)


def value(flags: tuple[str, ...], name: str) -> str:
    """As argparse has it: the last one given."""
    return flags[len(flags) - flags[::-1].index(name)]


def test_flags_of_the_runs(tmp_path: Path) -> None:
    made = plan(tmp_path, "--lr", "1e-4", "--dr-lora-rank", "4", "--hidden-size", "64")
    general, cone = parse("general,cone")
    base = made.base(10)
    runs = {arm.name: made.arm(arm, 2, 10, base) for arm in (general, cone)}
    assert value(base.flags, "--lr") == "3e-3" and "--dr-lora-rank" not in base.flags
    assert value(base.flags, "--hidden-size") == "64"
    for name, job in runs.items():
        assert value(job.flags, "--lr") == "1e-4" and value(job.flags, "--dr-lora-rank") == "4"
        assert value(job.flags, "--seed") == "2" and job.after == base.folder
        assert value(job.flags, "--train-data-path") == str(tmp_path / "general train.jsonl")
        assert ("--dr-target-data" in job.flags) == (name == "cone")
        held_out = {flag for flag in job.flags if flag.endswith(("valid.jsonl", "test.jsonl"))}
        assert len(held_out) == 4
    assert value(made.timed(cone).flags, "--dr-set") == "cone"


def test_a_loaded_model_has_no_base(tmp_path: Path) -> None:
    job = plan(tmp_path, checkpoint=tmp_path / "model").arm(parse("cone")[0], 1, 10, None)
    assert value(job.flags, "--load") == str(tmp_path / "model") and job.after is None


def test_another_content_is_another_run(tmp_path: Path) -> None:
    """Flags, files, what a run begins from: each makes another."""
    (cone,) = parse("cone")

    def fingerprints(*more: str, steps: int = 10) -> tuple[str, str]:
        made = plan(tmp_path, *more)
        base = made.base(steps)
        return base.fingerprint, made.arm(cone, 1, 10, base).fingerprint

    first = fingerprints()
    assert fingerprints() == first
    longer = fingerprints(steps=20)
    assert longer[0] != first[0] and longer[1] != first[1]  # the arm begins from the base
    assert fingerprints("--lr", "1")[1] != first[1]
    made = plan(tmp_path)
    made.splits.files["target"]["train"].write_text("changed")
    base = made.base(10)
    assert base.fingerprint == first[0]  # it never sees the target's training records
    assert made.arm(cone, 1, 10, base).fingerprint != first[1]


def asked(path: Path, *prompts: str) -> Path:
    lines = [{"prompt": prompt, "response": "b"} for prompt in prompts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_run_answers(tmp_path: Path) -> None:
    """The base model's too, with as many tokens as the others."""
    own = Metrics(("f1", "exact"), asked(tmp_path / "asked.jsonl", "a"), "asked.jsonl")
    made = plan(tmp_path, "--dr-generate-tokens", "9", "--lr", "1")
    made = dataclasses.replace(made, metrics=own)
    (cone,) = parse("cone")
    for job in (made.timed(cone), made.base(10), made.arm(cone, 1, 10, None)):
        assert value(job.flags, "--dr-generate") == str(own.samples)
        assert value(job.flags, "--dr-generate-metrics") == "f1,exact"
        assert value(job.flags, "--dr-generate-tokens") == "9"
    assert "--dr-generate" not in plan(tmp_path).base(10).flags


def test_what_is_answered(tmp_path: Path) -> None:
    """The target's test records, or a file, of which it is said what is trained on, too."""
    test, train = asked(tmp_path / "test.jsonl", "c"), asked(tmp_path / "train.jsonl", "a", "b")
    other = asked(tmp_path / "other.jsonl", "a", "d", "e")
    assert metrics(None, None, test) is None
    found = metrics("f1", None, test)
    assert found == Metrics(("f1",), test, "the target's test records")
    assert overlap(found, train) == ""
    found = metrics("f1", str(other), test)
    assert found is not None and found.samples == other
    assert overlap(found, train).startswith("note: 1 of 3 samples of ")
    other.write_text('{"prompt": "a", "response": "b"}\n{"text": "c"}\n')
    with pytest.raises(ValueError, match=f"answers to .*: {other}:2: a sample whose answer"):
        metrics("f1", str(other), test)
    with pytest.raises(ValueError, match="give one file of samples, not a folder"):
        metrics("f1", str(tmp_path), test)
