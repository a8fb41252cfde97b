"""The table of what differs between Megatron's versions, and what stands in for newest calls."""

import contextlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.training import global_vars

from megatron_dr.mcore.compat import differences, newest, until_0_18, versions
from megatron_dr.mcore.compat.differences import TABLE, Difference, chosen
from megatron_dr.mcore.refuse import refuse

from .. import versions as runs

ROOT = Path(__file__).parents[2]
CALLS = {f for _, f in inspect.getmembers(newest, inspect.isfunction)}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.older.__name__}-{row.until[1]}")
def test_a_row_stands_in_for_a_call(row: Difference) -> None:
    """With the same arguments; and it goes when its version does."""
    stock = getattr(newest, row.older.__name__)
    assert list(inspect.signature(row.older).parameters) == list(
        inspect.signature(stock).parameters
    )
    assert versions.OLDEST <= row.until < versions.NEWEST
    assert row.older.__module__.endswith("until_" + "_".join(map(str, row.until)))


def test_every_call_differs_somewhere() -> None:
    assert {f.__name__ for f in CALLS} == {row.older.__name__ for row in TABLE}


def test_the_oldest_row_that_still_holds_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> str:
        return "newest"

    rows = []
    for minor in (18, 16):
        older: Any = lambda minor=minor: f"until {minor}"  # noqa: E731
        older.__name__ = "call"
        rows.append(Difference((0, minor), older, "it differs"))
    monkeypatch.setattr(differences, "TABLE", rows)
    said = [chosen(call, (0, minor))() for minor in (15, 16, 17, 18, 19)]
    assert said == ["until 16", "until 16", "until 18", "until 18", "newest"]


def test_a_version_outside_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "INSTALLED", (0, 17))
    versions.check()
    with pytest.raises(ValueError, match=r"^megatron_dr in Megatron's training loop supports meg"):
        versions.check_loop()
    monkeypatch.setattr(versions, "INSTALLED", (1, 0))
    with pytest.raises(ValueError, match=r"^megatron_dr supports megatron-core 0.16 to 0\."):
        versions.check()


@pytest.mark.parametrize("chunks", [None, 2])
def test_hooks_change_all_chunks_where_a_function_builds_them(
    monkeypatch: pytest.MonkeyPatch, chunks: int | None
) -> None:
    """Megatron 0.18: one call a chunk, and a script's own function is as good as ours."""
    args = SimpleNamespace(virtual_pipeline_model_parallel_size=chunks)
    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
    seen: list[list[Any]] = []

    def build(pre_process: bool = True, **options: Any) -> str:
        return f"chunk {options.get('vp_stage')}"

    given = (build, "kind")
    change = until_0_18.change_model
    assert change(given, {}, seen.append, []) == given
    changed, kind = change(given, {}, seen.append, [("--dr-x", seen.append)])
    stages = [{}] if chunks is None else [{"vp_stage": stage} for stage in range(chunks)]
    for _ in range(2):  # Megatron builds a second model for some flags
        made = [changed(pre_process=True, **stage) for stage in stages]
        assert seen.pop() == made == [build(**stage) for stage in stages]
    assert kind == "kind" and not seen


EXPERTS = {
    "of one": (4, 2, 1, 1, True), "of two": (4, 2, 1, 2, False), "default": (4, 2, 1, None, False),
    "in parallel": (4, 2, 2, 1, False), "none": (None, 2, 1, 1, False),
}  # fmt: skip


@pytest.mark.parametrize("experts, tp, ep, etp, refused", EXPERTS.values(), ids=EXPERTS.keys())
def test_experts_whose_gradients_old_versions_leave_apart(
    experts: int | None, tp: int, ep: int, etp: int | None, refused: bool
) -> None:
    config = SimpleNamespace(
        num_moe_experts=experts, tensor_model_parallel_size=tp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )  # fmt: skip
    words = "^megatron_dr does not support --expert-tensor-parallel-size 1 without expert"
    with pytest.raises(ValueError, match=words) if refused else contextlib.nullcontext():
        refuse("megatron_dr does not support", until_0_18.OF_MODEL, config)


def test_ours_is_mended_where_a_function_builds_it() -> None:
    model = until_0_18.GPT(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    mended: list[Any] = []
    assert until_0_18.change_model((model, 1), {}, mended.append, []) == (model, 1)
    assert mended == [model]


def test_the_readmes_rows_are_of_supported_versions() -> None:
    """And in none did a test fail; which versions run is all that the index has."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("### Versions")[2]
    head, _, *rows = re.findall(r"^\|.*\|$", text.partition("\n## ")[0], re.M)
    assert head == f"| {' | '.join(runs.HEAD)} |" and rows
    minors = {f"0.{minor}" for minor in range(versions.OLDEST[1], versions.NEWEST[1] + 1)}
    for cells in ([cell.strip() for cell in row.strip("|").split("|")] for row in rows):
        minor, _, _ = cells[0].rpartition(".")
        trains = int(minor.partition(".")[2]) >= versions.OLDEST_LOOP[1]
        assert minor in minors and cells[5] == "0" and cells[3].endswith("training") == trains
    newest = f"0.{versions.NEWEST[1]}"  # not on the index
    assert {version.rpartition(".")[0] for version in runs.RELEASES} == minors - {newest}


def test_what_a_report_counts(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'
    )
    found = runs.Found("0.19.2", "2.14.1", "3.12.1", loop=False)
    assert runs.row(found, runs.counts(report), 119) == (
        "| 0.19.2 | 2.14.1 | 3.12.1 | attach, hosts | 3 | 3 | 3 | 2 |"
    )
