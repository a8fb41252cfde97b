"""One output for one input: with any number of workers, cut off anywhere, and never half of it."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_dr.cli.prepare import main

from ._prepare import command, documents, outputs, prepare, sources, write

COUNT = 600
FLAGS = ("--shard-size", 10, "--validation", 0.1, "--max-length", 60)


def lines() -> list[Any]:
    """Texts of many lengths; every third is one of ten that come again and again."""
    texts = (f"same {n % 10}" if n % 3 == 0 else f"{n} " * (n % 40 + 1) for n in range(COUNT))
    return [{"text": text} for text in texts]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """The data, and the output of one worker that nothing cut off."""
    folder = tmp_path_factory.mktemp("whole")
    data = write(folder / "a.jsonl", lines())
    prepare(data, folder / "p", *FLAGS)
    return data, outputs(folder, "p")


def test_workers_do_not_matter(whole: Any, tmp_path: Path) -> None:
    data, expected = whole
    prepare(data, tmp_path / "p", *FLAGS, "--workers", 3)
    assert outputs(tmp_path, "p") == expected
    assert {".bin", ".idx", ".json", "_loss_mask.bin", "_source.npy"} <= set(expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_run_again(whole: Any, tmp_path: Path, workers: int) -> None:
    """SIGKILL among the shards; the same command ends with the same bytes, its workers gone."""
    data, expected = whole
    given = command(data, tmp_path / "p", *FLAGS, "--workers", workers)
    run = multiprocessing.get_context("fork").Process(target=main, args=(given,))
    run.start()
    partial = tmp_path / "p.partial"
    while len(list(partial.glob("shard-*.npz"))) < 3:
        assert run.is_alive()
        time.sleep(0.001)
    assert run.pid is not None
    os.kill(run.pid, signal.SIGSTOP)
    children = psutil.Process(run.pid).children()
    assert len(children) == (workers if workers > 1 else 0)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert not psutil.wait_procs(children, timeout=20)[1]
    done = {path: path.stat().st_mtime_ns for path in partial.glob("shard-*.npz")}
    assert 3 <= len(done) < COUNT // 10 and not outputs(tmp_path, "p").get(".json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dr.data.prepare._merge", interrupt)
        with pytest.raises(SystemExit, match="goes on from here"):
            main(given)
    assert all(path.stat().st_mtime_ns == was for path, was in done.items())  # not done again
    prepare(data, tmp_path / "p", *FLAGS, "--workers", workers)
    assert outputs(tmp_path, "p") == expected


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_cut_off_while_it_names_its_files(whole: Any, tmp_path: Path) -> None:
    """Some files have their names, the manifest has not: the same command completes them."""
    data, expected = whole
    with pytest.MonkeyPatch.context() as patch:
        stock, left = os.replace, [5]

        def replace(source: Any, name: Any) -> None:
            if "output" in Path(source).parts:
                left[0] -= 1
                if not left[0]:
                    raise KeyboardInterrupt
            stock(source, name)

        patch.setattr(os, "replace", replace)
        with pytest.raises(SystemExit, match="goes on from here"):
            main(command(data, tmp_path / "p", *FLAGS))
    assert (tmp_path / "p.bin").exists() and not (tmp_path / "p.json").exists()
    prepare(data, tmp_path / "p", *FLAGS)
    assert outputs(tmp_path, "p") == expected


def test_a_finished_run_is_not_done_again(whole: Any, tmp_path: Path) -> None:
    data, _ = whole
    prepare(data, tmp_path / "p", *FLAGS)
    was = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    prepare(data, tmp_path / "p", *FLAGS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == was


def test_changed_since(tmp_path: Path) -> None:
    """Other flags or other data under the same name are refused, finished or not."""
    data = write(tmp_path / "a.jsonl", [*lines()[:20], "{"])
    flags = ("--shard-size", 5)
    with pytest.raises(SystemExit, match="a.jsonl:21: not JSON"):
        main(command(data, tmp_path / "p", *flags))
    write(data, lines()[:20])
    with pytest.raises(SystemExit, match=r"changed since: the input \(.*a.jsonl\).*--restart"):
        main(command(data, tmp_path / "p", *flags))
    prepare(data, tmp_path / "p", *flags, "--restart")
    with pytest.raises(SystemExit, match="changed since: max_length, seed"):
        main(command(data, tmp_path / "p", *flags, "--seed", 1, "--max-length", 50))
    assert len(documents(tmp_path / "p")) == 20
    manifest = tmp_path / "p.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(SystemExit, match=r"changed since: how samples are encoded.*--restart"):
        main(command(data, tmp_path / "p", *flags))


def test_validation_shares_no_sample_and_no_content(whole: Any) -> None:
    """By ids, by lines and by tokens; together the two sides are the whole."""
    data, _ = whole
    train, held_out = data.parent / "p", data.parent / "p_validation"
    places = [tuple(s) for prefix in (train, held_out) for s in sources(prefix)]
    assert len(places) == len(set(places)) == COUNT
    tokens = [{tuple(ids) for ids, _ in documents(prefix)} for prefix in (train, held_out)]
    assert tokens[0] and tokens[1] and not tokens[0] & tokens[1]
    assert len(documents(held_out)) == 60
