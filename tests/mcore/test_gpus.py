"""The figures of a node's GPUs in a run; NVML itself, absent here, is stood in for."""

import sys
from pathlib import Path

import pytest

from megatron_dr.mcore.loop import run as runs
from megatron_dr.report import gpus, metrics
from tests.report.test_gpus import Nvml

from ._train import cone, data, flags, run

__all__ = ["data"]


def test_one_rank_of_a_node_writes_them_at_each_log(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "m.jsonl")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    monkeypatch.setattr(runs.cpu, "is_enabled", lambda: False)
    more = f"{cone(data)} --dr-metrics {path} --log-interval 2"
    assert [code for code, _, _ in run(flags(data, more, 4))] == [0, 0]
    lines = metrics.read(gpus.path_beside(path), "gpus")
    assert [line["iteration"] for line in lines] == [2, 4]
    assert len(metrics.read(path, "train")) == 4
