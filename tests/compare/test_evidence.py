"""`benchmarks/evidence`: its data are apart, its arms alike, its tables say what the numbers do."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "evidence"))

import case_runs  # noqa: E402
import cases  # noqa: E402
import evidence  # noqa: E402
import measures  # noqa: E402
import snippets  # noqa: E402
import store  # noqa: E402
import tables  # noqa: E402
from families import FAMILIES, FIRST_HALF  # noqa: E402

CASES = {case.name: case for of_table in cases.TABLES.values() for case in of_table}


def texts(lines: list[str]) -> list[str]:
    return [json.loads(line)["text"] for line in lines]


OWN = {name: case for name, case in CASES.items() if not case.data}  # others have one of these


@pytest.mark.parametrize("case", OWN.values(), ids=OWN)
def test_no_record_is_in_two_places(case: cases.Case) -> None:
    """Targets, pool, and both roles' validation and test; and the same seed draws the same."""
    target, pool = cases.lines(case, 3)
    assert (target, pool) == cases.lines(case, 3) and target != cases.lines(case, 4)[0]
    parts = [target, pool, *cases.held_out(case).values()]
    found = [set(texts(part)) for part in parts]
    assert len(set.union(*found)) == sum(map(len, found))
    assert [len(texts) for texts in (found[0], *found[2:])] == [case.size, 64, 192, 64, 192]
    kind = "code" if case.code else "es"
    languages = [json.loads(line)["language"] for line in target]
    assert languages.count(kind) == case.size - round(case.noise * case.size)
    hidden = [json.loads(line)["language"] for line in pool].count(kind)
    taken = 0 if case.code else case.size
    assert hidden == (600 - taken if case.hidden else 0)
    assert len(pool) == 5400 + hidden - round(case.noise * case.size)


@pytest.mark.parametrize("name", cases.VARIANTS)
def test_a_variant_has_the_same_data_and_other_runs(tmp_path: Path, name: str) -> None:
    """In steps, optimizer, model or blocks, of all arms alike."""
    arms = [arm for family in ("general", "mix", "cone", "auto") for arm in FAMILIES[family]]
    plain, other = CASES["es8"], CASES[f"es8-{name}"]
    (_, *of_plain), _ = case_runs.runs(tmp_path, plain, 3, arms)
    (_, *found), _ = case_runs.runs(tmp_path, other, 3, arms)
    assert cases.lines(plain, 3) == cases.lines(other, 3)
    changes = []
    for before, after in zip(of_plain, found, strict=True):
        assert after.data.digest == before.data.digest and after.job.folder != before.job.folder
        now, then = (Counter(flag for flag in run.job.flags if str(tmp_path) not in flag)
                     for run in (after, before))  # fmt: skip
        changes.append((now - then, then - now))
    assert all(change == changes[0] for change in changes) and any(changes[0])


def test_snippets_share_no_line() -> None:
    concurrency, others = snippets.drawn()
    assert len(concurrency) > 64 + 192 + 16 and len(others) > 600
    every = [*concurrency, *others]
    lines = [line for text in every for line in set(map(str.strip, text.splitlines()))]
    long = [line for line in lines if len(line) >= 16]
    assert len(long) == len(set(long))
    assert all(40 <= len(text.encode()) <= 120 for text in every)
    assert len({text.encode()[:64] for text in every}) == len(every)


def test_cut() -> None:
    source = (
        '"""Of no use, since it is a docstring."""\nif a:\n    # neither\n    one = f(2222222222)\n'
    )
    source += "    another = one + 333333333333333\n\n    three = 3\n"
    assert list(snippets.cut(source)) == ["one = f(2222222222)\nanother = one + 333333333333333"]


def test_data_are_written_once(tmp_path: Path) -> None:
    case = CASES["es8"]
    data = cases.write(case, 3, tmp_path)
    changed = data.pool.stat().st_mtime_ns
    assert cases.write(case, 3, tmp_path) == data and data.pool.stat().st_mtime_ns == changed
    assert cases.write(case, 4, tmp_path).digest != data.digest


def value(flags: tuple[str, ...], name: str) -> str | None:
    """As argparse has it: the last one given."""
    return flags[len(flags) - flags[::-1].index(name)] if name in flags else None


def test_arms_differ_in_nothing_else(tmp_path: Path) -> None:
    """Five dials at most; the same batches, data and steps."""
    assert all(1 <= len(arms) <= 5 for arms in FAMILIES.values())
    arms = [arm for own in FAMILIES.values() for arm in own]
    found, (base, half) = case_runs.runs(tmp_path, CASES["es8"], 3, arms)
    (before, *found) = found
    assert before.arm is None and value(before.job.flags, "--lr") == "1e-30"
    same = ("--global-batch-size", "--seed", "--train-data-path", "--valid-data-path",
            "--test-data-path", "--dr-target-valid-data", "--dr-target-test-data", "--eval-iters",
            "--num-layers", "--seq-length")  # fmt: skip
    for flag in same:
        assert len({value(run.job.flags, flag) for run in found}) == 1, flag
    for run in found:
        arm, flags = run.arm, run.job.flags
        assert arm is not None
        assert value(flags, "--dr-target-batch-size") == ("8" if arm.uses_target else None)
        assert value(flags, "--train-iters") == str(run.job.steps)
        start = half if arm.family == "sequential" else base
        assert value(flags, "--load") == str(start.folder) and run.job.after == start.folder
        own = arm.family in ("target", "sequential")
        assert own or (run.job.steps, value(flags, "--lr")) == (50, "2e-3")
    assert FIRST_HALF.steps == half.steps == 25 and value(half.flags, "--dr-target-data") is None
    assert len({run.job.folder for run in found}) == len(found)


def arm(family: str, dial: str, target: list[float], general: list[float]) -> measures.Measured:
    return measures.Measured(family, dial, target, target, general)


def found(case: str, *arms: measures.Measured) -> measures.Found:
    best = {a.family: measures.chosen([b for b in arms if b.family == a.family]) for a in arms}
    return measures.Found(CASES[case], [1, 2], list(arms), best, (3.0, 1.7))


# general: 3.0, 1.7; by share: down to 2.2 at 1.9, then both get worse
MIXES = (
    arm("general", "", [3.0, 3.0], [1.7, 1.7]), arm("mix", "0.1", [2.4, 2.4], [1.8, 1.8]),
    arm("mix", "0.3", [2.1, 2.3], [1.9, 1.9]), arm("mix", "0.5", [2.5, 2.5], [2.0, 2.0]),
)  # fmt: skip


def test_the_frontier_of_the_mixes() -> None:
    points = [a.point for a in MIXES]
    assert measures.frontier(points) == [2, 1, 0]
    assert measures.shares(points, 2.3) == pytest.approx([0, 0.5, 0.5, 0])
    assert measures.shares(points, 2.0) == [0, 0, 1, 0]  # no mix has so low a target loss
    assert measures.shares(points, 9.0) == [1, 0, 0, 0]


def test_a_verdict() -> None:
    """By hand: the mean of auto's target is 2.3, half way between two mixes of 1.8 and 1.9."""
    auto = arm("auto", "", [2.2, 2.4], [1.86, 1.88])
    cone = arm("cone", "0.1", [2.0, 2.2], [2.2, 2.2])
    said = measures.verdict(found("es8", *MIXES, cone, auto))
    assert said is not None and said.first is cone and said.mix.dial == "0.3"
    assert said.from_first.mean == pytest.approx(100 * 0.2 / 2.1)
    assert said.from_mix.mean == pytest.approx(100 * 0.1 / 2.2)
    assert said.above.mean == pytest.approx(0.02) and not said.beyond
    assert said.above.se == pytest.approx(0.01)
    assert said.bars["target"] is False and said.bars["mix"] is False
    best = arm("auto", "", [2.0, 2.1], [1.91, 1.91])
    said = measures.verdict(found("es8", *MIXES, best))
    assert said is not None and said.beyond and said.above.mean == pytest.approx(0.01)
    assert said.from_mix.mean == pytest.approx(-100 * 0.15 / 2.2)
    assert said.bars == {"target": True, "general": True, "mix": True}  # by 3 standard errors
    many = measures.verdict(found("es64", *MIXES, best))
    assert many is not None and many.bars["mix"] is None


def row(family: str, dial: str, seed: int, target: float, **more: float | str) -> store.Row:
    made = store.Row("es8", family, dial, seed, target, target + 0.1, 1.7, 1.8, 9.0, "data", "base",
                     "3.12", "0")  # fmt: skip
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    first = [row("auto", "", 1, 2.2), row("mix", "0.1", 1, 2.3), row("mix", "0.3", 1, 2.4)]
    store.add(path, first)
    store.add(path, [row("auto", "", 1, 2.1), row("auto", "", 2, 2.0)])
    kept = {found.key: found for found in store.read(path)}
    assert len(kept) == 4 and kept["es8", "auto", "", 1] == row("auto", "", 1, 2.1)
    own = measures.gather(CASES["es8"], list(kept.values()))
    assert own is not None and own.seeds == [1]  # the mixes have no second one
    assert own.best["mix"].dial == "0.1" and own.best["mix"].target == [2.4]
    assert measures.gather(CASES["es64"], list(kept.values())) is None


@pytest.mark.parametrize(
    "more, said",
    [({"drawn": "other"}, "can't be compared"), ({"target_test": float("nan")}, "no number")],
)  # fmt: skip
def test_results_that_do_not_go_together(
    tmp_path: Path, more: dict[str, float | str], said: str
) -> None:
    path = tmp_path / "results.csv"
    store.add(path, [row("mix", "0.1", 1, 2.3), row("auto", "", 1, 2.2, **more)])
    with pytest.raises(ValueError, match=said):
        store.read(path)
    store.add(path, [row("auto", "", 1, 2.2)])  # run again
    assert len(store.read(path)) == 2


def test_what_is_missed_is_said(tmp_path: Path) -> None:
    """The whole of `table`, from a file of results."""
    path, console = tmp_path / "results.csv", Console(quiet=True)
    rows = [row("general", "", seed, 3.0, general_test=1.7) for seed in (1, 2)]
    rows += [row("mix", "0.3", seed, 2.0 + 0.1 * seed, general_test=1.9) for seed in (1, 2)]
    rows += [row("auto", "", seed, 2.1 + 0.12 * seed, general_test=1.8) for seed in (1, 2)]
    rows.append(row("target", "5e-4, 20 steps", 1, 2.5, general_test=2.2))
    store.add(path, [*rows, row(store.BEFORE, "", 1, 3.1)])
    evidence.show("sizes", path, console)  # of the one seed that all arms have
    assert "of 1 seed(s)" in (tmp_path / "es8.md").read_text(encoding="utf-8")
    evidence.show("sizes", path, console, ("general", "mix", "auto"))
    text = (tmp_path / "sizes.md").read_text(encoding="utf-8")
    assert "MISSED" in text and "Missed: es8: target +5.8 ± 0.4% from mix 0.3" in text
    assert "es8: +5.8 ± 0.4% from the best mix, +13.0 standard errors" in text
    assert "| 0.3 | 2.150 ± 0.050 | 2.250" in (tmp_path / "es8.md").read_text(encoding="utf-8")
    assert (tmp_path / "sizes.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no results of noise"):
        evidence.show("noise", path, console)
    assert tables.EDGE not in (tmp_path / "es8.md").read_text(encoding="utf-8")
