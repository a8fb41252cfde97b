"""DPO through Megatron's loop, against one process in float64; resume; data; bad input."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.config.dpo import PreferenceConfig
from megatron_dr.data.pairs import FilePairs
from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.dpo import data as preference_data
from megatron_dr.mcore.dpo import reference
from megatron_dr.mcore.dpo.part import DPOPart
from megatron_dr.mcore.dpo.step import loss_func
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args
from megatron_dr.report import metrics

from ..data import _chat, _prepare
from ..data._tokenizer import ByteTokenizer
from . import _oracle, _rl
from ._datasets import ONE, arguments, on_ranks
from ._dpo import ROWS, STEPS, Data, OracleRun, record, regularised, run

STOP = 1  # steps before a run is resumed


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Pairs, and a model to begin with: Megatron draws parameters by stage."""
    folder = tmp_path_factory.mktemp("dpo")
    found: Data = {"base": folder / "base", "metrics": folder / "base.jsonl"}
    for name, first, count in (("general", 0, 13), ("target", 20, 6), ("held_out", 10, 8)):
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(record(n)) for n in range(first, first + count)]
        path.write_text("\n".join(lines))
        found[name] = str(path)
    found["start"] = _rl.parameters(
        run(found, f"--save {found['base']} --dr-metrics {found['metrics']}", 1)
    )
    return found


@pytest.fixture(scope="module")
def oracles(data: Data) -> dict[str, OracleRun]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_oracle, "LAYERS", 2)
        patch.setattr(_oracle, "PADDED", 272)
        return {rows: OracleRun(data, rows) for rows in ROWS}


def compare(ended: Any, path: Path, oracle: OracleRun, first: int = 0) -> None:
    found = _rl.parameters(ended)
    trained, validated = metrics.read(path, "train"), metrics.read(path, "validation")
    assert [line["iteration"] for line in trained] == list(range(first + 1, STEPS + 1))
    expected = [*oracle.logged[first:], oracle.validated]
    for got, want in zip([*trained, validated[0]], expected, strict=True):
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=2e-3, abs=1e-4), (name, got, want)
    for name, value in oracle.p.items():
        torch.testing.assert_close(
            found[name], value.detach().flatten().float(), rtol=1e-3, atol=1e-4, msg=name
        )


LAYOUTS = {
    "dp2": ("slot", "--calculate-per-token-loss", 2),
    "tp2_sp": ("slot", "--tensor-model-parallel-size 2 --sequence-parallel", 4),
    "pp2": ("slot", "--pipeline-model-parallel-size 2", 4),
    "step_tp2_sp": ("step", "--tensor-model-parallel-size 2 --sequence-parallel", 0),
    "microbatch_dp2": ("microbatch", "", 0),
}


@pytest.mark.parametrize("rows, layout, slots", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_train_as_the_oracle(
    data: Data, oracles: dict[str, OracleRun], tmp_path: Path, rows: str, layout: str, slots: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    more = f"{regularised(data, rows, slots)} {layout} --dr-metrics {path}"
    compare(run(data, more, world=2), path, oracles[rows])


def test_a_resumed_run_is_one_that_did_not_stop(
    data: Data, oracles: dict[str, OracleRun], tmp_path: Path
) -> None:
    """In another layout, and with the reference of the run's start."""
    folder, path = tmp_path / "save", tmp_path / "metrics.jsonl"
    common = f"{regularised(data, 'slot', 4)} --save {folder}"
    _rl.parameters(run(data, f"{common} --exit-interval {STOP}"))
    resumed = common.replace(str(data["base"]), str(folder)).replace("--finetune", "")
    resumed = resumed.replace("--no-load-optim", "")
    more = f"{resumed} --pipeline-model-parallel-size 2 --dr-metrics {path}"
    compare(run(data, more, world=2), path, oracles["slot"], first=STOP)


def test_skipped_iterations_pass_over_their_pairs_in_every_layout(
    data: Data, tmp_path: Path
) -> None:
    """General pairs alone: the target's go on where they were."""
    found = []
    for world, layout in enumerate(("", "--tensor-model-parallel-size 2 --sequence-parallel"), 1):
        path = tmp_path / f"{world}.jsonl"
        more = f"{regularised(data, 'slot', 4)} {layout} --iterations-to-skip 2 --dr-metrics {path}"
        found.append((_rl.parameters(run(data, more, world=world)), metrics.read(path, "train")))
    (one, lines), (two, others) = found
    for every in (lines, others):
        assert [line["iteration"] for line in every] == [1, 3]
    for name in ("dpo loss", "margin", "target dpo loss", "target margin"):
        for line, other in zip(lines, others, strict=True):
            assert other[name] == pytest.approx(line[name], rel=2e-3, abs=1e-4), name
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_without_a_target_the_first_step_is_at_the_reference(data: Data) -> None:
    """--dr-dpo-beta alone is plain DPO; an unchanged policy has no margin at all."""
    (line,) = metrics.read(data["metrics"], "train")
    assert line["dpo loss"] == pytest.approx(math.log(2))
    names = ("accuracy", "margin", "chosen log ratio", "rejected log ratio")
    assert [line[name] for name in names] == [0.0, 0.0, 0.0, 0.0]
    assert not any("target" in name for name in line)


def test_prepared_pairs_are_those_of_files(tmp_path: Path) -> None:
    """Sample by sample in a blend, texts and messages; wrong datasets are refused."""
    folder = _chat.saved(tmp_path / "tokenizer")
    paths: dict[str, list[str]] = {"file": [], "prepared": []}
    for name, weight in (("texts", 3), ("messages", 1)):
        records: list[Any] = [record(n) for n in range(9)]
        if name == "messages":
            records = [{key: [{"role": "user" if key == "prompt" else "assistant", "content": text}]
                        for key, text in row.items()} for row in records]  # fmt: skip
        file, prefix = _prepare.write(tmp_path / f"{name}.jsonl", records), tmp_path / f"p_{name}"
        _prepare.prepare(file, prefix, tokenizer=folder)
        paths["file"] += [str(weight), str(file)]
        paths["prepared"] += [str(weight), str(prefix)]

    def read(tp: int) -> Any:
        out, opened = {}, {}
        for kind, blend in paths.items():
            more = ("--tokenizer-model", folder, "--seq-length", "64",
                     "--max-position-embeddings", "64", *ONE, *blend)  # fmt: skip
            args = arguments(*more)
            config = datasets.dataset_config(args)
            opened = {p: preference_data.open_pairs(p, config) for p in blend[1::2]}
            train, *others = preference_data.general_datasets(args, [24, 0, 0], opened)
            assert others == [None, None] and args.eval_iters == 0  # else Megatron evaluates
            found = [{k: v.tolist() for k, v in train[n].items()} for n in range(24)]
            out[kind] = (found, [pairs.keys for pairs in opened.values()])
        config.sequence_length = 6
        with pytest.raises(ValueError) as long:
            preference_data.open_pairs(blend[1], config)
        with pytest.raises(ValueError) as none:
            preference_data.open_pairs(blend[1] + "_chosen", config)
        return out, str(long.value), str(none.value)

    ((found, long, none),) = on_ranks(1, read)
    assert found["file"] == found["prepared"] and len(found["file"][1][1]) == 9
    assert f"{paths['prepared'][1]}: pair " in long and "more than the 7 of --seq-length" in long
    assert "_chosen: no preference pairs there" in none and "_chosen_chosen.idx)" in none


def test_a_resume_needs_the_references_of_its_pairs(data: Data, tmp_path: Path) -> None:
    pairs = {name: FilePairs(data[name], ByteTokenizer(), 32) for name in ("general", "target")}
    reference.load(data["base"], [pairs["general"]])
    assert pairs["general"].reference_N2 is not None
    assert pairs["general"].reference_N2.shape == (13, 2)
    with pytest.raises(ValueError, match="the pair .*target.jsonl:1 was not in the run that saved"):
        reference.load(data["base"], list(pairs.values()))
    with pytest.raises(ValueError, match="no such file, so the checkpoint is not of a run with"):
        reference.load(tmp_path, [])
    (tmp_path / reference.FILE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="log_probs.safetensors: can't be read"):
        reference.load(tmp_path, [])


def test_a_pair_that_does_not_fit_is_one_sentence_at_start(data: Data) -> None:
    (first, _, error, _), (second, _, other, _) = run(data, "--seq-length 16", 1, world=2)
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1, error[-2000:]
    assert "general.jsonl:6: the chosen answer and its prompt have 19 tokens, more than" in said[0]
    assert "megatron_dr: error" not in other
    assert first == second == 2


WRONG = {
    "--dr-dpo-beta 0": "--dr-dpo-beta must be finite and above 0",
    "--dr-dpo-label-smoothing 0.5": r"--dr-dpo-label-smoothing must be in \[0, 0.5\)",
    "--dr-pack": r"--dr-dpo-beta does not go with --dr-pack \(pairs are not packed\): drop it",
    "--mock-data": "does not go with --mock-data",
    "--dr-rl-algorithm grpo": "does not go with --dr-rl-algorithm",
    "--context-parallel-size 2": "--context-parallel-size 2: set --context-parallel-size 1",
    "--expert-model-parallel-size 2": "set --expert-model-parallel-size 1",
    "--dr-rows sample --num-experts 4": "with --dr-rows sample does not go with --num-experts",
}


def parsed(more: str) -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser())
    parser.add_argument("--mock-data", action="store_true")
    for name in ("context-parallel-size", "expert-model-parallel-size", "num-experts"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args(more.split())


def check(args: argparse.Namespace) -> None:
    assert DPOPart().of(args) is not None
    DPOPart().refuse(args)


@pytest.mark.parametrize("more, sentence", WRONG.items())
def test_contradictions_are_refused(more: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check(parsed(f"--dr-dpo-beta 0.1 {more}"))


def test_its_flags() -> None:
    with pytest.raises(ValueError, match="--dr-dpo-label-smoothing needs --dr-dpo-beta"):
        check(parsed("--dr-dpo-label-smoothing 0.1"))
    args = parsed("--dr-dpo-beta 0.1")
    check(args)
    for more, name in (("", "mean"), ("--dr-metrics m", "mean"), ("--dr-target-data t", "cone")):
        found = configs_from_args(parsed(f"--dr-dpo-beta 0.1 {more}"))
        assert found is not None and found[0].set == name


def test_nan_is_a_number_in_no_value_of_the_log() -> None:
    batch = {"reference_log_prob": torch.zeros(4), "answer_mask": torch.ones(4, 3)}
    losses = torch.ones(4, 3)
    losses[0, 1] = torch.nan  # of the first pair's chosen answer
    *_, logged = loss_func(PreferenceConfig(), batch, losses)
    assert logged.pop("rejected log ratio").isfinite().all()
    assert len(logged) == 4 and all(pair[0].isnan() for pair in logged.values())
