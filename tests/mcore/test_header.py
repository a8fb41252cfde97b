"""What a run's metrics say beside its steps: what it is, its blocks' figures, that it has ended."""

from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_dr.cli import report
from megatron_dr.report import metrics, run_log, status

from ._train import cone, data, flags, run

__all__ = ["data"]


SECRET = "12f3of-the-user"
NAMES = ("WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")


def test_a_run_says_what_it_is_and_that_it_has_ended(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing of the keys in its environment."""
    for name in NAMES:
        monkeypatch.setenv(name, SECRET)
    path = tmp_path / "metrics.jsonl"
    more = f"{cone(data)} --dr-blocks layer --dr-log-blocks --dr-metrics {path}"
    more += f" --save {tmp_path} --save-interval 2 --dr-record {tmp_path / 'record'}"
    more += " --dr-record-every 1"
    more += f" --tensorboard-dir {tmp_path / 'board'}"
    code, out, error = run(flags(data, f"{more} --exit-interval 2", 3), world=1)[0]
    assert code == 0, error
    assert SECRET not in out + error
    found = run_log.read(path)
    assert (found.step, found.steps, found.has_ended) == (2, 3, True)  # told to stop, and it did
    code, _, error = run(flags(data, f"{more} --load {tmp_path}", 3), world=1)[0]
    assert code == 0, error
    kinds = [line["kind"] for line in metrics.lines(path)]
    step = ["train", "blocks"]
    assert kinds == ["run", *step * 2, "end", "run", *step, "validation", "validation", "end"]
    _says_what_it_is(run_log.read(path), data)
    assert report.main([str(path), "--out", str(tmp_path / "page.html")]) == 0
    _has_no_secret(tmp_path)


def _has_no_secret(folder: Path) -> None:
    """Checkpoints, metrics, record, TensorBoard's files, page."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {".distcp", ".metadata", ".jsonl", ".parquet", ".html"} <= kinds | {
        p.name for p in files
    }
    assert any("tfevents" in path.name for path in files)
    for path in files:
        tables = path.suffix == ".parquet" and str(pyarrow.parquet.read_table(path).to_pylist())
        assert SECRET.encode() not in path.read_bytes() and SECRET not in (tables or ""), path


def _says_what_it_is(found: run_log.RunLog, data: dict[str, str]) -> None:
    assert found.has_ended and status.sentence(found) == "Ended at step 3 of 3."
    assert [found.about[name] for name in ("steps", "ranks", "device")] == [3, 1, "CPU"]
    assert found.about["layout"]["data"] == 1 and found.about["projection"]["set"] == "cone"
    assert ["--dr-target-data", data["target"]] in found.about["flags"]
    assert "megatron-core" in found.about["versions"]
    steps, cosines = found.of_blocks("dr cos update")
    assert steps == [1, 2, 3] and {len(of) for of in cosines} == {len(found.blocks)}
    assert "decoder.layers.0" in found.blocks
    assert all(-1 <= one <= 1 for of in cosines for one in of)
    memory = found.curve("train", "peak memory bytes")
    assert memory is not None and memory.last > 1e8
