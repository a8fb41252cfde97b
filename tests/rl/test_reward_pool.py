"""Reward functions that raise, hang, crash or return nonsense cost their sample and no more."""

import logging
import os
import re
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from megatron_dr.rl.reward_pool import RewardPool, Sample, Scores

MISBEHAVING = "tests.rl.misbehaving:reward"


def score(completions: list[str], **arguments: float) -> Scores:
    """Each sample's reward, if all is well, is its number."""
    samples = [Sample("", text, number) for number, text in enumerate(completions)]
    with closing(RewardPool(MISBEHAVING, workers=2, timeout=5.0, **arguments)) as pool:
        return pool.score(samples)


def test_rewards_keep_the_order() -> None:
    scores = score(["fine"] * 25)
    assert scores.rewards == [float(n) for n in range(25)]
    assert not scores.failures


def test_failures_cost_their_sample_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    bad = ["raise", "_exit", "segfault", "none", "text", "nan", "inf", "exit"]
    completions = [text for each in bad for text in (each, "fine")]
    with caplog.at_level(logging.WARNING):
        scores = score(completions)
    assert scores.rewards == [None if n % 2 == 0 else float(n) for n in range(2 * len(bad))]
    assert scores.failures == Counter(raised=2, crashed=2, invalid=4)
    text = caplog.text
    assert "sample 0: KeyError: 'no such key'" in text
    assert "sample 4: was ended by signal 11" in text
    assert "sample 10: returned nan, not a finite number" in text
    assert "failed on 2 crashed, 4 invalid, 2 raised of 16 samples" in text


def test_a_failure_names_the_sample_by_where_it_is_from(caplog: pytest.LogCaptureFixture) -> None:
    """In one line that moves no terminal: completions are in messages of errors."""
    samples = [Sample("", "terminal", 0), Sample("", "raise", 1, "asked.jsonl:7")]
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=5.0)) as pool:
        pool.score(samples)
    assert f"reward {MISBEHAVING}, asked.jsonl:7: KeyError: 'no such key'" in caplog.text
    assert "ValueError: \\x1b[2J\\nINFO all is well; token: (left out)" in caplog.text


def test_numbers_that_training_can_not_hold_are_no_rewards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        scores = score(["huge", "fine", "longer", "beyond", "fine"])
    assert scores.rewards == [None, 1.0, None, None, 4.0]
    assert scores.failures == Counter(invalid=3)
    assert re.search(r"sample 0: returned 1000+\.\.\.0+, not a finite number", caplog.text)
    assert "sample 2: returned <Fraction instance at" in caplog.text
    assert "sample 3: returned 1e+39, not a finite number" in caplog.text


@pytest.mark.parametrize("how", [pytest.param("sleep", marks=pytest.mark.soak), "loop"])
def test_hanging_samples_end_at_the_timeout_and_get_no_reward(how: str) -> None:
    samples = [Sample("", text, n) for n, text in enumerate(["fine", how, "fine", how, "fine"])]
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=0.5)) as pool:
        scores = pool.score(samples)
        assert scores.rewards == [0.0, None, 2.0, None, 4.0]
        assert scores.failures == Counter(timeout=2)
        assert pool.score(samples[:1]).rewards == [0.0]  # the pool lives on


def test_children_of_a_late_function_are_killed_too(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=2.0)) as pool:
        assert pool.score([Sample(str(path), "child", 0)]).failures == Counter(timeout=1)
        assert not [pid for pid in path.read_text().split() if runs(int(pid))]


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie, after up to two seconds of grace."""
    for _ in range(20):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.1)
    return True


def test_what_a_function_prints_is_no_reward() -> None:
    assert score(["fine", "print", "numpy"]).rewards == [0.0, 1.0, 0.5]


def test_what_a_function_writes_or_reads_anywhere_is_no_reply_and_no_sample() -> None:
    """Its own descriptors are closed to nothing; only the reply has the question's word."""
    bad = ["forge", "garbage", "read", "flood"]
    each = [text for name in bad for text in (name, "fine")]
    samples = [Sample("", text, number) for number, text in enumerate(each)]
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=60.0)) as pool:
        scores = pool.score(samples)
    assert scores.rewards == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, None, 7.0]
    assert scores.failures == Counter(crashed=1)


@pytest.mark.parametrize("timeout", [25 * 86400.0, 1e300])
def test_a_timeout_may_be_longer_than_the_kernel_waits(timeout: float) -> None:
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=timeout)) as pool:
        assert pool.score([Sample("", "fine", 3)]).rewards == [3.0]


NO_NAMESPACES = """
from megatron_dr.rl import sandbox
no = "import os\\ndef no(*_): raise OSError('no namespaces here')\\nos.unshare = no"
sandbox._BOOT = sandbox._BOOT.replace("\\n", f"\\n{no}\\n", 1)
"""


@pytest.mark.parametrize("unsafe", [False, True])
def test_a_machine_that_cant_keep_code_apart_is_told_at_the_start(
    unsafe: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Workers start with a module that takes namespaces from the sandbox's launcher."""
    (tmp_path / "sitecustomize.py").write_text(NO_NAMESPACES)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "megatron_dr.rl.rewards:unit_tests"
    if not unsafe:
        with pytest.raises(ValueError, match="can't be kept apart.*or give --dr-rl-unsafe-sandbox"):
            RewardPool(name, workers=1, timeout=30.0)
        return
    with closing(RewardPool(name, 1, 30.0, unsafe_sandbox=True)) as pool:
        assert pool.score([Sample("", "x = 1", "assert x == 1")]).rewards == [1.0]


def test_workers_end_with_the_pool() -> None:
    with closing(RewardPool(MISBEHAVING, workers=1, timeout=5.0)) as pool:
        pid = pool._processes[0]._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_long_samples_pass_whole() -> None:
    text = "x" * 300_000 + "é\n\u2028"
    with closing(RewardPool("megatron_dr.rl.rewards:exact_match", workers=1, timeout=10.0)) as pool:
        assert pool.score([Sample("p", text, text), Sample("p", text, text[1:])]).rewards == [1, 0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("exact_match", "named module:function, not 'exact_match'"),
        ("no.such.module:f", "No module named 'no'"),
        ("tests.rl.misbehaving:missing", "has no attribute 'missing'"),
        ("tests.rl.misbehaving:not_a_function", "is a int, not a function"),
    ],
)
def test_a_wrong_name_is_told_before_the_first_batch(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(name, workers=2, timeout=1.0)


def test_a_pool_without_workers_or_time_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        RewardPool(MISBEHAVING, workers=0, timeout=1.0)
    with pytest.raises(ValueError, match="above 0"):
        RewardPool(MISBEHAVING, workers=1, timeout=0.0)
