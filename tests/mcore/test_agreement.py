"""Ranks that were started differently, or one of which refuses: one sentence, exit code 2."""

import os
import shutil
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import torch.distributed as dist

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import collectives, errors
from megatron_dr.mcore.loop import agreement

from . import _megatron
from ._data import Layout
from ._ranks import run_ranks
from ._train import cone, data, flags, launch

__all__ = ["data"]


def launched(argvs: list[list[str]]) -> tuple[int, str, str]:
    return launch(argvs[dist.get_rank()])


DIFFERENT = {
    "seed": ("--dr-seed 1", "--dr-seed is 0 on rank 0 and 1 on rank 1: start every rank"),
    "slots": ("--dr-slots 4", "--dr-slots is 2 on rank 0 and 4 on rank 1"),
    "data": ("--dr-target-data {other}", " bytes, sha256 "),
    "its file": ("--dr-target-data {tmp}/none.jsonl", "on rank 0 and no such data: {tmp}/none"),
    "a part": ("--dr-lora-rank 4", "--dr-lora-rank is not given on rank 0 and 4 on rank 1"),
    "a refusal": ("--dr-alpha 2", "error: alpha must be in [0, 1], not 2.0. (on rank 1)"),
    "a flag of no effect": ("--sft", "does not act on --sft ("),
    "one with another": ("--reset-attention-mask", "drop it. (on rank 1)"),
    "layout": ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size is 1 on rank 0"),
    "general data": ("--train-data-path {other}", "--train-data-path is "),
}


@pytest.mark.parametrize(
    "more, sentence", [*DIFFERENT.values(), (None, "")], ids=[*DIFFERENT, "off"]
)
def test_ranks_that_differ_end_alike(
    data: dict[str, str], tmp_path: Path, more: str | None, sentence: str
) -> None:
    other = shutil.copy(data["held_out"], tmp_path / "other.jsonl")
    own = flags(data, cone(data) + " " + (more or "").format(other=other, tmp=tmp_path), 1)
    if more is None:
        own, sentence = flags(data, "", 1), "the plugin is on on rank 0 and off on rank 1"
    argvs = [flags(data, cone(data), 1), own]
    (first, out, error), (second, _, silent) = run_ranks(2, launched, argvs)
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and sentence.format(tmp=tmp_path) in said[0], error
    assert first == second == 2 and "megatron_dr: error" not in silent
    assert "building GPT" not in out  # no model, no process groups of Megatron's


def test_the_same_data_elsewhere_are_the_same() -> None:
    assert agreement.difference([{"a": 1, "b": [1, 2]}] * 3) == ""
    found = agreement.difference([{"a": 1}, {"a": 1}, {"a": None}, {"a": 1}])
    assert "--a is 1 on ranks 0, 1, 3 and not given on rank 2" in found


def met(port: int) -> str:
    """The check before Megatron meets at the same address, without a launcher's store."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    for _ in range(2):
        agreement.check(Namespace(), "", {"a": 1})
    dist.init_process_group("gloo")
    dist.barrier()
    return "" if dist.get_world_size() == 2 else "alone"


def test_ranks_meet_where_megatron_will() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    assert run_ranks(2, met, port) == ["", ""]


def refused_alone() -> str:
    """A rank that does not come to what the others wait for sends its refusal there."""
    try:
        with errors.agreed():
            if dist.get_rank() == 1:
                raise ValueError("no file.")
            with errors.agreed():
                collectives.of_all_ranks("never given")
    except ValueError as error:
        return str(error)
    return ""


def attached_otherwise() -> str:
    dr = DRConfig(slots=2, alpha=0.5 if dist.get_rank() else 0.1)
    try:
        _megatron.train(Layout(dp=2), 0, None, lambda m, o, c: megatron_dr.attach(m, o, c, dr))
    except ValueError as error:
        return str(error)
    return ""


def test_a_rank_that_refuses_is_heard_wherever_the_others_are() -> None:
    assert run_ranks(2, refused_alone) == ["no file. (on rank 1)"] * 2
    said = run_ranks(2, attached_otherwise)
    assert said == ["attach was given alpha 0.1 on rank 0 and 0.5 on rank 1: give every rank the "
                    "same configuration."] * 2  # fmt: skip
