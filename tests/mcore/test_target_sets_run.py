"""Runs with several target sets: what is logged, validated, tested, kept and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.report import metrics

from ._train import SENTENCES, data, flags, run

__all__ = ["data"]

TIMES = ("ms", "seconds", "bytes")


@pytest.fixture
def sets(data: dict[str, str], tmp_path: Path) -> str:
    """Flags of two target sets of their own sizes, batches and weights, each with held-out data."""
    for name, count in (("law", 6), ("med", 5)):
        lines = [{"text": f"{name} {n} {SENTENCES[n % 4]}"} for n in range(count)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = f"law={tmp_path}/law.jsonl med={tmp_path}/med.jsonl"
    return f"""--dr-target-data {both} --dr-target-weights law=3 --dr-slots 2
        --dr-target-batch-size law=4 med=2 --dr-target-valid-data {both}"""


def numbers(path: Path, kind: str) -> list[dict[str, Any]]:
    """Lines without what a clock or a counter of memory says."""
    return [
        {name: value for name, value in line.items() if not name.endswith(TIMES)}
        for line in metrics.read(path, kind)
    ]


def is_mean(line: dict[str, Any], of: str) -> bool:
    return line[of] == pytest.approx(0.75 * line[f"{of} law"] + 0.25 * line[f"{of} med"], rel=1e-5)


def test_a_resumed_run_of_two_sets_is_the_uninterrupted_one(
    sets: str, data: dict[str, str], tmp_path: Path
) -> None:
    """Each set goes on in its own order; each has losses of its own, and a mean of both."""
    whole, parts, folder = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "saved"
    tested = sets[sets.index("law=") : sets.index("--dr-target-weights")]
    more = f"{sets} --eval-interval 2 --calculate-per-token-loss --dr-target-test-data {tested}"
    saved = f"{more} --save {folder} --save-interval 3 --dr-metrics {parts}"
    code, out, error = run(flags(data, f"{more} --dr-metrics {whole}", 5), 2)[1]
    assert code == 0, error
    assert "target loss law" in out and "target test loss med PPL" in out
    assert run(flags(data, f"{saved} --exit-interval 3", 5), 2)[0][0] == 0
    code, _, error = run(flags(data, f"{saved} --load {folder}", 5), 2)[0]
    assert code == 0, error
    for kind, lines in (("train", 5), ("validation", 3), ("target test", 1)):
        expected, found = numbers(whole, kind), numbers(parts, kind)
        assert found == expected and len(found) == lines, kind
        name = "target test loss" if kind == "target test" else "target loss"
        assert all(is_mean(line, name) for line in found)


def test_what_is_said_of_sets(sets: str, data: dict[str, str], tmp_path: Path) -> None:
    """At the start of a run, and where a rank has no two halves of a set."""
    code, out, error = run(flags(data, f"{sets} --eval-iters 0", 1), 1)[0]
    assert code == 2 and "--dr-target-valid-data needs validation" in error
    code, out, error = run(flags(data, sets, 2), 1)[0]
    assert code == 0, error
    assert "megatron_dr: target set law: 6 samples, 4 of them a step, weight 0.75" in out
    assert "megatron_dr: target set med: 5 samples, 2 of them a step, weight 0.25" in out
    assert "note: --dr-alpha-style auto counts passes over law, the target set" in out
    assert "alpha auto: the run has 6 different target samples (n), a step 4 (b)" in out
    code, out, error = run(flags(data, sets.replace("med=2", "med=1"), 1), 1)[0]
    assert code == 0, error
    assert "a rank's 5 target microbatches make no two halves with as many of each target" in out


@pytest.mark.soak
@pytest.mark.parametrize("more", ["", "--dr-dpo-beta 0.1", "--dr-pack", "--dr-rows sample"])
def test_one_set_with_a_name_is_one_without(
    data: dict[str, str], tmp_path: Path, more: str
) -> None:
    """The same steps and losses, bit for bit."""
    if "dpo" in more:
        for path in data.values():
            pairs = [{"prompt": "a", "chosen": f" b{n}", "rejected": " c"} for n in range(20)]
            Path(path).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    found = []
    for number, name in enumerate(("", "law=")):
        path = tmp_path / f"{number}.jsonl"
        given = f"""{more} --dr-target-data {name}{data["target"]} --dr-target-batch-size 4
            --dr-target-valid-data {name}{data["held_out"]} --dr-metrics {path}"""
        code, _, error = run(flags(data, given, 3), 2)[0]
        assert code == 0, error
        kinds = [line for kind in ("train", "validation") for line in numbers(path, kind)]
        found.append(kinds)
    for plain, named in zip(*found, strict=True):
        assert plain == {key: value for key, value in named.items() if not key.endswith(" law")}


@pytest.mark.soak
def test_a_resumed_run_with_maximin_is_the_uninterrupted_one(
    sets: str, data: dict[str, str], tmp_path: Path
) -> None:
    own = sets.replace("--dr-target-weights law=3", "--dr-targets maximin --dr-alpha 0.2")
    whole, parts, folder = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "saved"
    code, out, error = run(flags(data, f"{own} --dr-metrics {whole}", 4), 2)[0]
    assert code == 0, error
    assert "target set med: 5 samples, 2 of them a step, weight found at every step" in out
    saved = f"{own} --save {folder} --save-interval 2 --dr-metrics {parts}"
    assert run(flags(data, f"{saved} --exit-interval 2", 4), 2)[0][0] == 0
    assert run(flags(data, f"{saved} --load {folder}", 4), 2)[0][0] == 0
    found = numbers(parts, "train")
    assert found == numbers(whole, "train") and len(found) == 4
    for line in found:
        weights = [line[f"dr target weight {name}"] for name in ("law", "med")]
        assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0
        both = [line[f"target loss {name}"] for name in ("law", "med")]
        assert line["target loss"] == pytest.approx(sum(both) / 2)
