"""The file that names the last whole checkpoint is replaced; what writes ends with its rank."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_dr.mcore import compat
from megatron_dr.mcore.loop import tracker, writers


def test_it_names_one_all_the_time(tmp_path: Path) -> None:
    path = tmp_path / tracker.NAME
    path.write_text("3")
    with tracker.opened(open, str(path), "w") as file:
        file.write("6")
        file.flush()
        assert path.read_text() == "3"
    assert path.read_text() == "6" and os.listdir(tmp_path) == [tracker.NAME]
    with pytest.raises(OSError, match="full"), tracker.opened(open, path, "w") as file:
        file.write("9")
        raise OSError("the disk is full")
    assert path.read_text() == "6"
    with tracker.opened(open, path) as file:
        assert file.read() == "6"
    with tracker.opened(open, tmp_path / "other", "w") as file:
        assert Path(file.name) == tmp_path / "other"
    seen: list[object] = []
    tracker.opened(lambda *given: seen.append(given), f"msc://bucket/{tracker.NAME}", "w")
    assert seen == [(f"msc://bucket/{tracker.NAME}", "w")]


def test_megatron_opens_its_files_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = pytest.importorskip("megatron.core.msc_utils")
    monkeypatch.setitem(vars(module.maybe_msc), "open", None)  # put back afterwards
    compat.open_checkpoints_by(tracker.opened)
    path = tmp_path / tracker.NAME
    path.write_text("3")
    with module.maybe_msc.open(str(path), "w") as file:
        assert path.read_text() == "3"
        file.write("6")
    assert path.read_text() == "6"


def started(pids: "multiprocessing.Queue[int]") -> None:
    """On a rank: Megatron's process for results is started."""
    filesystem_async._results_queue = None
    queue = writers._results(filesystem_async.get_write_results_queue)
    queue.put(1)
    pids.put(queue._manager._process.pid)
    time.sleep(100)


def test_what_a_killed_rank_has_started_ends() -> None:
    fork = multiprocessing.get_context("fork")
    pids = fork.Queue()
    rank = fork.Process(target=started, args=(pids,))
    rank.start()
    own = pids.get(timeout=60)
    assert Path(f"/proc/{own}").exists() and rank.pid is not None
    os.kill(rank.pid, signal.SIGKILL)
    rank.join()
    end = time.monotonic() + 10
    while _lives(own) and time.monotonic() < end:
        time.sleep(0.05)
    lives = _lives(own)
    if lives:
        os.kill(own, signal.SIGKILL)
    assert not lives


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
