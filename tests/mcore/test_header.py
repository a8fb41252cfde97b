"""What a run's metrics say beside its steps: what it is, its blocks' figures, that it has ended."""

from pathlib import Path

from megatron_dr.report import metrics, run_log, status

from ._train import cone, data, flags, run

__all__ = ["data"]


def test_a_run_says_what_it_is_and_that_it_has_ended(data: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    more = f"{cone(data)} --dr-blocks layer --dr-log-blocks --dr-metrics {path}"
    more += f" --save {tmp_path} --save-interval 2"
    code, _, error = run(flags(data, f"{more} --exit-interval 2", 3), world=1)[0]
    assert code == 0, error
    found = run_log.read(path)
    assert (found.step, found.steps, found.has_ended) == (2, 3, True)  # told to stop, and it did
    code, _, error = run(flags(data, f"{more} --load {tmp_path}", 3), world=1)[0]
    assert code == 0, error
    kinds = [line["kind"] for line in metrics.lines(path)]
    step = ["train", "blocks"]
    assert kinds == ["run", *step * 2, "end", "run", *step, "validation", "validation", "end"]
    _says_what_it_is(run_log.read(path), data)


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
