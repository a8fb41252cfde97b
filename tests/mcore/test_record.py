"""Recorded weights are the oracle's, the same in every layout, whole over a resume."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.data.identities import Identity, content
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.mcore.data.named import KEY, noted
from megatron_dr.mcore.loop import recorder
from megatron_dr.mcore.step import chosen
from megatron_dr.mcore.step.chosen import Chosen
from megatron_dr.report import record

from . import _oracle, _samples
from ._data import Layout
from ._pairs import some
from ._ranks import run_ranks
from ._sample_oracle import Oracle
from ._samples import MICROBATCHES, SAMPLES, Case
from ._train import data, flags, run, two_corpora

__all__ = ["data"]

EVERY = 10**6


# -- beside the dense oracle -----------------------------------------------------------------------
def recorded(layout: Layout, case: Case, initial: Any) -> tuple[tuple[str, ...], Chosen]:
    """On a rank: what it speaks for in a step, and the blocks' names."""
    stock, handles = megatron_dr.attach, []

    def attach(*args: Any) -> Any:
        handles.append(stock(*args))
        handles[0].keeps = True
        return handles[0]

    megatron_dr.attach = attach
    _samples.train(layout, case, 1, initial)
    return handles[0].rows.names, chosen.of_log(handles[0].log, EVERY)


def expected(layout: Layout, case: Case) -> dict[tuple[str, int], float]:
    """The share of each sample of the step's global batch, by block."""
    oracle = Oracle(replace(layout.alone, dp=layout.dp), case)
    initial = _oracle.initial(layout)
    parameters = {k: v.double().requires_grad_() for k, v in initial.items()}
    oracle.update(parameters, 0)
    numbers = [[(n * layout.dp + rank) * SAMPLES + j for j in range(SAMPLES)]
               for rank in range(layout.dp) for n in range(MICROBATCHES)]  # fmt: skip
    if case.window == "step":
        numbers = [sum(numbers, [])]
    found, seen = {}, dict[str, int]()
    for solved in oracle.solved:
        window = seen[solved.block] = seen.get(solved.block, -1) + 1
        for number, weight in zip(numbers[window], solved.weights, strict=True):
            found[solved.block, number] = weight * len(solved.weights)
    return found


MATRIX = Case()
LAYER = Case(blocks="layer", set="cone", norm="general")
STEP = Case(window="step", set="cone", norm="general")
CASES = {
    "dp2-matrix": (Layout(dp=2), MATRIX),
    "dp2-layer": (Layout(dp=2), LAYER),
    "tp2-sp-step": (Layout(tp=2, sequence_parallel=True), STEP),
    "pp2-matrix": (Layout(pp=2), MATRIX),
    "dp2-step": (Layout(dp=2), STEP),
    "tp2-sp-matrix": (Layout(tp=2, sequence_parallel=True), MATRIX),
    "pp2-tied-layer": (Layout(pp=2, tied=True), LAYER),
    "cp2-layer": (Layout(cp=2, full_masks=True), LAYER),
    "tp2-pp2-layer": (Layout(tp=2, pp=2), LAYER),
}


@pytest.mark.parametrize("layout, case", some(CASES, *[*CASES][4:]))
def test_recorded_weights_equal_the_oracle(layout: Layout, case: Case) -> None:
    ranks = run_ranks(layout.world, recorded, layout, case, _oracle.initial(layout))
    names = ranks[0][0]
    found = chosen.joined([rows for _, rows in ranks])
    keys = [(names[block], row) for block, row in zip(found.block, found.row, strict=True)]
    wanted = expected(layout, case)
    assert len(keys) == len(set(keys)) and set(keys) == wanted.keys()
    assert found.weight == pytest.approx([wanted[key] for key in keys], abs=1e-3)
    scores = found.score[~np.isnan(found.score)]
    assert (np.abs(scores) <= 1 + 1e-9).all()
    assert len(scores) == len(found.score) or case.set == "topk"  # which needs no rows' lengths


# -- of what a rank keeps --------------------------------------------------------------------------
def rows(block: Sequence[int], row: Sequence[int], weight: Sequence[float]) -> Chosen:
    weights = np.array(weight, float)
    return Chosen(np.array(block), np.array(row), weights, 0 * weights)


def test_the_most_and_the_least_of_each_block() -> None:
    every = rows([0] * 6 + [1] * 2, [5, 4, 3, 2, 1, 0, 1, 0], [1, 1, 1, 9, 0, 1, 2, 3])
    found = chosen.extremes(every, 2)
    assert [*zip(found.block, found.row, found.weight, strict=True)] == [
        (0, 0, 1), (0, 1, 0), (0, 2, 9), (1, 0, 3), (1, 1, 2)
    ]  # fmt: skip
    assert found.left_out == 3
    assert chosen.extremes(rows([], [], []), 2).left_out == 0


def test_the_extremes_of_ranks_are_those_of_all() -> None:
    generator = np.random.default_rng(0)
    block, weight = generator.integers(0, 3, 60), generator.integers(0, 5, 60).astype(float)
    whole = rows(block, np.arange(60), weight)
    parts = [chosen.extremes(whole[np.arange(rank, 60, 4)], 3) for rank in range(4)]
    once, again = chosen.extremes(whole, 3), chosen.extremes(chosen.joined(parts), 3)
    assert (once.row == again.row).all() and once.left_out == again.left_out
    assert (np.bincount(once.block) <= 6).all()


def test_numbers_leave_the_batch_before_anything_sees_it() -> None:
    named = torch.tensor([[[0, 4]], [[1, 2]]])
    packed = torch.tensor([[[0, 4], [0, 5], [-1, -1]]])
    batches = [{"tokens": 1, KEY: named}, {"tokens": 2, KEY: packed}, {"tokens": 3}]
    seen: list[torch.Tensor] = []
    chunks = noted([None, iter(batches), iter(batches)], seen)
    assert chunks[0] is None
    assert [*chunks[1]] == [*chunks[2]] == [{"tokens": 1}, {"tokens": 2}, {"tokens": 3}]
    assert [part.tolist() for part in seen] == [[[0, 4], [1, 2]], [[0, 4], [0, 5]]]
    assert KEY in batches[0]  # Megatron may run the step again


def test_a_slot_has_the_samples_of_its_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot 1 of the second of two groups of 2 data ranks, of 4 microbatches each."""
    monkeypatch.setattr(recorder.parallel_state, "get_context_parallel_world_size", lambda: 1)
    train = SimpleNamespace(
        corpora=["a", "b"], sources=lambda corpus: {f"{corpus}.jsonl": "ff"},
        identity=lambda corpus, number: Identity(f"{corpus}.jsonl", number, None, f"text:{number}"),
    )  # fmt: skip
    row_map = RowMap(groups=2, slots=2, ranks=2)
    rows = SimpleNamespace(layout=SimpleNamespace(row_map=row_map))
    handle = SimpleNamespace(dr=DRConfig(rows="slot", slots=2), rows=rows)
    named = {rank: [np.array([[0, 10 * rank + m]]) for m in range(4)] for rank in range(4)}
    who = recorder._Who(handle, train, named)
    corpus, found = who.of_row(3, listed=True)
    assert (corpus, found.file, found.line) == ("a", "0.jsonl", None)
    assert json.loads(found.id) == [f"0.jsonl:{n}" for n in (22, 23, 32, 33)]
    assert json.loads(found.hash) == [f"text:{n}" for n in (22, 23, 32, 33)]
    named[3][3] = np.array([[1, 33]])
    assert recorder._Who(handle, train, named).of_row(3, listed=True)[0] is None  # of two corpora
    assert recorder._Who(handle, None, {}).of_row(3, listed=True) == (None, Identity())
    assert who.sources == {"0.jsonl": "ff"}


# -- through the training entry --------------------------------------------------------------------
SAMPLE = """--dr-rows sample --micro-batch-size 2 --dr-blocks layer --dr-window microbatch
    --dr-set cone --dr-alpha 0.1 --eval-iters 0 --dr-record-every 1"""


def asked(data: dict[str, str], folder: Path, more: str = "", steps: int = 4) -> list[str]:
    target = f"--dr-target-data {data['target']} --dr-target-batch-size 4"
    return flags(data, f"{target} {SAMPLE} --dr-record {folder} {more}", steps)


def alike(one: Any, other: Any) -> None:
    """Two records: the same rows of the same samples, and weights to rounding."""
    for name in ("step", "block", "row", "kind", "corpus", "file", "line", "id", "hash"):
        assert one[name].to_pylist() == other[name].to_pylist(), name
    for name in ("weight", "score"):
        assert one[name].to_pylist() == pytest.approx(other[name].to_pylist(), abs=5e-3), name


def test_a_resumed_run_in_another_layout_has_the_record_of_a_whole_one(
    data: dict[str, str], tmp_path: Path
) -> None:
    """It goes on after step 2, though step 3 is in the record already."""
    saved = f"--save {tmp_path / 'saved'} --save-interval 2 "
    for argv, world in (
        (asked(data, tmp_path / "whole"), 1),
        (asked(data, tmp_path / "parts", saved + "--exit-interval 3"), 2),
        (asked(data, tmp_path / "parts", f"{saved} --load {tmp_path / 'saved'} --ckpt-step 2"), 2),
    ):
        found = run(argv, world)
        assert [code for code, _, _ in found] == [0] * world, found[0][2]
    assert "rows of steps after 2 are cut, which run again" in found[0][1]
    whole, parts = (record.read(tmp_path / name) for name in ("whole", "parts"))
    blocks = len(whole["block"].unique())
    assert whole["step"].to_pylist() == [s for s in (1, 2, 3, 4) for _ in range(8 * blocks)]
    alike(parts, whole)
    lines = Path(data["general"]).read_text().splitlines()
    for row in whole.slice(0, 8).to_pylist():
        assert row["file"] == row["corpus"] == data["general"]
        assert row["hash"] == content(json.loads(lines[row["line"] - 1]))
    sums = np.array(whole["weight"]).reshape(4, blocks, 8)
    assert (sums >= 0).all() and not np.allclose(sums, 1.0)


@pytest.mark.soak
@pytest.mark.parametrize(
    "layout", ["--tensor-model-parallel-size 2", "--pipeline-model-parallel-size 2", "--dr-pack"]
)
def test_the_same_record_in_every_layout(data: dict[str, str], tmp_path: Path, layout: str) -> None:
    pack = "--micro-batch-size 1 --seq-length 96 --max-position-embeddings 96 " * (
        layout == "--dr-pack"
    )
    for name, more, world in (("one", layout * bool(pack), 1), ("two", layout, 2)):
        found = run(asked(data, tmp_path / name, pack + more, 2), world)
        assert [code for code, _, _ in found] == [0] * world, found[0][2]
    alike(record.read(tmp_path / "two"), record.read(tmp_path / "one"))


@pytest.mark.soak
def test_slots_say_which_samples_and_a_step_is_bounded(
    data: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "r"
    more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-slots 2
        --dr-record {folder} --dr-record-every 2 --dr-record-rows 1 --eval-iters 0"""
    found = run(flags(data, more, 3))
    assert [code for code, _, _ in found] == [0, 0], found[0][2]
    table = record.read(folder)
    assert table["step"].to_pylist() == [2, 2] and record.about(table)["left_out"] == 2
    for row in table.to_pylist():
        assert row["kind"] == "slot" and row["file"] == data["general"] and row["line"] is None
        ids, hashes = json.loads(row["id"]), json.loads(row["hash"])
        lines = Path(data["general"]).read_text().splitlines()
        numbers = [int(one.removeprefix(data["general"] + ":")) for one in ids]
        assert len(ids) == 2 and hashes == [content(json.loads(lines[n - 1])) for n in numbers]


@pytest.mark.soak
def test_domains_are_recorded_by_name_and_path(data: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "r"
    more = f"""{two_corpora(data, tmp_path)} --dr-target-data {data["target"]} --dr-rows domain
        --dr-target-batch-size 4 --dr-record {folder} --dr-record-every 1 --eval-iters 0"""
    assert [code for code, _, _ in run(flags(data, more, 2))] == [0, 0]
    for row in record.read(folder).to_pylist():
        assert row["file"] == str(tmp_path / f"{row['corpus']}.jsonl")
    assert record.read(folder)["corpus"].to_pylist() == ["english", "german"] * 2


@pytest.mark.soak
def test_a_record_of_another_run_is_refused(data: dict[str, str], tmp_path: Path) -> None:
    record.Writer(tmp_path / "r").flush()
    columns = {name: [1] for name in ("step", "row", "line")} | {"weight": [1.0]}
    columns |= {name: ["a"] for name in ("block", "kind", "corpus", "file", "id", "hash")}
    writer = record.Writer(tmp_path / "r")
    writer.add(columns | {"score": [None]}, 0, {})
    writer.flush()
    found = run(asked(data, tmp_path / "r"))
    assert [code for code, _, _ in found] == [2, 2]
    assert "the record of another run is there" in found[0][2]


@pytest.mark.parametrize(
    "dr, target, message",
    [
        ({"set": "mean"}, {}, "--dr-record has nothing to record with --dr-set mean"),
        ({}, {"record_every": 7}, "--dr-record-every 7 records no step of a run of 6"),
        ({}, {"record_rows": 0}, "record_rows must be at least 1, not 0"),
        ({}, {"record_every": 0}, "record_every must be at least 1, not 0"),
    ],
)
def test_what_would_record_nothing_is_refused(
    dr: dict[str, Any], target: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        own = TargetConfig(record="r", **{"record_every": 1} | target)
        recorder.check(Namespace(train_iters=6), DRConfig(**dr), own)


def test_without_pyarrow_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--dr-record needs pyarrow: pip install"):
        recorder.check(Namespace(train_iters=6), DRConfig(), TargetConfig(record="r"))
    recorder.check(Namespace(train_iters=6), DRConfig(), TargetConfig())
