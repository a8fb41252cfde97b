"""A rank that stands still is named and nothing else happens; one that is gone ends the others."""

import os
import re
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr.mcore import progress, stall

from . import _data, _layouts, _megatron, _oracle, _ranks
from ._data import Layout
from ._problem import Problem
from ._ranks import run_ranks

DP3, DP4 = Layout(dp=3, target_ranks=1, targets=2), Layout(dp=4, target_ranks=1)
STOPPED = 6.0  # seconds


def train(layout: Layout, seconds: float, disturb: Any, initial: Any) -> list[Any]:
    """On a rank: parameters after two steps, the second of which rank 2 disturbs."""
    dr = _layouts.config(layout, Problem(), stall_seconds=seconds)
    model, optimizer, config = _megatron.build(layout, initial)
    handle = megatron_dr.attach(model, optimizer, config, dr)
    rank = parallel_state.get_data_parallel_rank()
    on_target = rank < layout.target_ranks
    for step in range(2):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        general = [] if on_target else _data.general(layout, step, rank)
        kwargs = _megatron.schedule(layout, model, general)
        kwargs["num_microbatches"] = layout.num_general
        if step == 1 and rank == 2:
            kwargs["forward_step_func"] = partial(disturb, _megatron.forward_step)
        handle.step(
            get_forward_backward_func(), num_target_microbatches=layout.num_target,
            target_data_iterator=iter(_data.target(layout, step, rank) if on_target else []),
            **kwargs,
        )  # fmt: skip
        optimizer.step()
    handle.detach()
    return [p.detach().tolist() for p in model[0].parameters()]


def stop(stock: Any, data: Any, module: Any) -> Any:
    """Once: the process stands still for a while."""
    if not stopped:
        stopped.append(1)
        time.sleep(1.0)  # ticks
        subprocess.Popen(["sh", "-c", f"sleep {STOPPED}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    return stock(data, module)


stopped: list[int] = []


def test_a_rank_that_stands_still_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    def both(initial: Any) -> bool:
        _megatron.initialize(DP3)
        plain = train(DP3, 0.0, lambda stock, *args: stock(*args), initial)
        return train(DP3, 1.2, stop, initial) == plain

    assert run_ranks(3, both, _oracle.initial(DP3), timeout=400) == [True] * 3  # to the last bit
    said = re.findall(
        r"rank (\d) has waited \d+ s \((.*)\) for (.*?): (.*)", capfd.readouterr().err
    )
    about_two = [(rank, where, how) for rank, where, who, how in said if who == "rank 2"]
    assert about_two, said
    rank, where, how = about_two[0]
    assert rank in "01" and "step 1, " in where and "in collective" in where
    assert "rank 2 was last in step 1, forwards and backwards, forward of general" in how
    assert "no sign of life" in how


def killed(initial: Any) -> None:
    def kill(*_: Any) -> None:
        time.sleep(1.5)  # ticks
        os.kill(os.getpid(), signal.SIGKILL)

    _megatron.initialize(DP4)
    train(DP4, 2.0, kill, initial)


def raising(initial: Any) -> None:
    _megatron.initialize(DP4)
    train(DP4, 2.0, lambda *_: [][1], initial)


def ended(world: int, function: Any, *args: Any) -> tuple[list[int], float]:
    """Each rank's exit status, and seconds to the last one's end, of ranks that nobody kills."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _ranks._child(rank, world, Path(folder), function, args)
            children.append(pid)
        try:
            left, codes, first = set(children), {}, 0.0
            limit = time.monotonic() + 150
            while left and time.monotonic() < limit:
                for pid in list(left):
                    done, status = os.waitpid(pid, os.WNOHANG)
                    if done:
                        left.remove(pid)
                        codes[pid] = os.waitstatus_to_exitcode(status)
                        first = first or time.monotonic()
                time.sleep(0.02)
            assert not left
            return [codes[pid] for pid in children], time.monotonic() - first
        finally:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


@pytest.mark.parametrize("function", [killed, raising])
def test_who_is_gone_ends_the_others_with_its_name(
    function: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, seconds = ended(4, function, _oracle.initial(DP4))
    assert codes == [1, 1, -9 if function is killed else 1, 1]
    assert seconds < 30
    said = re.findall(r"rank (\d) ends, as rank 2 (.*)", capfd.readouterr().err)
    assert {rank for rank, _ in said} == {"0", "1", "3"}
    word = (
        "is gone without a word: rank 2 was last in" if function is killed else "ended with Index"
    )
    assert all(how.startswith(word) for _, how in said), said


def test_off_there_is_no_thread() -> None:
    def step() -> tuple[bool, int]:
        _megatron.initialize(Layout(dp=2))
        dr = _layouts.config(Layout(dp=2), Problem(), stall_seconds=0.0)
        megatron_dr.attach(*_megatron.build(Layout(dp=2)), dr)
        return stall._watch is None, progress.here.step

    assert run_ranks(2, step) == [(True, -1)] * 2
