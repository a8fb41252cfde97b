"""A run that is resumed in another layout goes on as the one that kept its own, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.report import metrics

from ._pairs import some
from ._train import data, flags, run, unjudged
from .kills.compare import weights

__all__ = ["data"]

STEPS, STOP = 4, 2
# one sequence in a row, so that rows are the same on any number of data ranks
COMMON = f"""--make-vocab-size-divisible-by 136 --global-batch-size 4 --eval-iters 0 --adam-eps 1e-6
    --save-interval {STOP}"""
BY_PARAMETER = "--dist-ckpt-optim-fully-reshardable"
MOE = """--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2
    --moe-token-dispatcher-type alltoall"""
SAMPLES = """--dr-rows sample --micro-batch-size 2 --dr-set topk --dr-fraction 0.5 --dr-norm tokens
    --dr-blocks matrix --dr-window streaming"""
EP = "--expert-model-parallel-size"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
SLOTS, TWO_SLOTS, RANKS = "--dr-slots 4", "--dr-slots 2", "--dr-rows rank"
ONE_ROW = f"{RANKS} --dr-row-ranks 4"  # expert-parallel ranks share a row
# of the run before and of the one that goes on: ranks, flags
CHANGES = {
    "tp2": ((1, SLOTS), (2, f"{SLOTS} {TP2}")),
    "pp2": ((1, SLOTS), (2, f"{SLOTS} --pipeline-model-parallel-size 2")),
    "dp2": ((1, SLOTS), (2, TWO_SLOTS)),
    "slots to ranks": ((2, TWO_SLOTS), (4, RANKS)),
    "cp2": ((1, SLOTS), (2, f"{SLOTS} --context-parallel-size 2")),
    "streaming tp2": ((1, SAMPLES), (2, f"{SAMPLES} {TP2}")),
    "ep2": ((4, f"{ONE_ROW} {MOE} {EP} 4"), (4, f"{ONE_ROW} {MOE} {EP} 2")),
}
SAME = ("lm loss", "target loss", "dr cos general", "dr alpha")


def started(data: dict[str, str], folder: Path, ranks: int, more: str) -> Any:
    """(code, error) of a run to the end; what it saved and logged is in the folder."""
    plain = unjudged(data).replace("--dr-slots 2", "")
    argv = f"{plain} {COMMON} --save {folder} --dr-metrics {folder}/metrics.jsonl {more}"
    code, _, error = run(flags(data, argv, STEPS), ranks)[0]
    return code, error


@pytest.mark.parametrize("before, after", some(CHANGES, "dp2", "cp2"))
def test_a_resume_in_another_layout_goes_on(
    data: dict[str, str], tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    """The optimizer's state, the averages of alpha, the places in the data, too."""
    folders = whole, other = tmp_path / "whole", tmp_path / "other"
    code, error = started(data, whole, before[0], f"{before[1]} {BY_PARAMETER}")
    assert code == 0, error
    resumed = f"{after[1]} {BY_PARAMETER} --load {whole} --ckpt-step {STOP}"
    code, error = started(data, other, after[0], resumed)
    assert code == 0, error
    expected, found = (metrics.read(one / "metrics.jsonl", "train") for one in folders)
    assert [line["iteration"] for line in found] == [3, 4]
    for one, line in zip(expected[STOP:], found, strict=True):
        for name in SAME:
            assert line[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    kept, loaded = (weights(one, STEPS) for one in folders)
    assert kept.keys() == loaded.keys() and kept
    for name, value in kept.items():
        torch.testing.assert_close(loaded[name], value, rtol=1e-3, atol=1e-4, msg=name)


REFUSED = {
    "tp2": ((1, SLOTS), (2, f"{SLOTS} {TP2}"), "--dist-ckpt-optim-fully-reshardable; or give"),
    "ep2": (
        (2, f"{TWO_SLOTS} {MOE} {BY_PARAMETER}"), (2, f"{TWO_SLOTS} {MOE} {BY_PARAMETER} {EP} 2"),
        "--expert-model-parallel-size 2, and the checkpoint's run had 1: Megatron does not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("before, after, sentence", some(REFUSED, "tp2"))
def test_what_can_not_go_on_is_refused(
    data: dict[str, str], tmp_path: Path, before: Any, after: Any, sentence: str
) -> None:
    """Before anything is loaded, on every rank."""
    code, error = started(data, tmp_path / "whole", *before)
    assert code == 0, error
    resumed = f"{after[1]} --load {tmp_path / 'whole'} --ckpt-step {STOP}"
    code, error = started(data, tmp_path / "other", after[0], resumed)
    assert code == 2 and sentence in error, (code, error[-3000:])
