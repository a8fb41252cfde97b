"""Whose gradient has NaN: the sentence on rank 0, in layouts that name rows differently."""

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig

from . import _data, _layouts, _megatron, _oracle, _samples
from ._data import Layout
from ._problem import Problem
from ._ranks import run_ranks
from ._samples import Case


def poisoned(calls: list[int], wrong: int, data: Any, module: Any) -> Any:
    """A microbatch's forward; the output of number `wrong`, target ones counted first, is NaN."""
    output, loss = _megatron.forward_step(data, module)
    calls.append(1)
    return output * (float("nan") if len(calls) == wrong + 1 else 1.0), loss


def step(layout: Layout, gram: str, where: tuple[int, int], wrong: int) -> None:
    """On a rank: a step in which one microbatch of rank `where` (data, context) has NaN."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout)
    model[0].ddp_config.check_for_nan_in_grad = True
    dr = _layouts.config(layout, Problem(gram=gram))
    handle = megatron_dr.attach(model, optimizer, config, dr)
    rank = parallel_state.get_data_parallel_rank()
    here = where == (rank, parallel_state.get_context_parallel_rank())
    kwargs = _megatron.schedule(layout, model, _data.general(layout, 0, rank))
    kwargs["forward_step_func"] = partial(poisoned, [], wrong if here else -1)
    with pytest.raises(Exception, match="NaN"):  # Megatron's own check stops the step
        handle.step(
            get_forward_backward_func(),
            target_data_iterator=iter(_data.target(layout, 0, rank)),
            num_target_microbatches=layout.num_target,
            domains=_data.domains(layout, rank) if layout.domains else (),
            **kwargs,
        )


RANK = "the general gradient of data-parallel rank {}, slot {},"
CP = Layout(cp=2, dp=2, full_masks=True)
OTHERS = Layout(dp=3, target_ranks=1)  # ranks 1 and 2 are rows 0 and 1
CORPORA = Layout(dp=2, domains=3)  # two target microbatches, then those of corpora 2, 0, 0, 1
CASES = {  # layout, gram, rank (data, context), its microbatch, who is named
    "slot": (Layout(dp=2), "exact", (1, 0), 4, RANK.format(1, 1)),
    "slot sketched": (Layout(dp=2), "sketch", (1, 0), 3, RANK.format(1, 0)),
    "target": (Layout(dp=2), "exact", (1, 0), 1, "the target's gradient"),
    "corpus": (CORPORA, "exact", (1, 0), 5, "the general gradient of corpus 1"),
    "corpus sketched": (CORPORA, "sketch", (1, 0), 2, "the general gradient of corpus 2"),
    "target ranks": (OTHERS, "exact", (2, 0), 0, RANK.format(2, 0)),
    "target ranks' own": (OTHERS, "sketch", (0, 0), 0, "the target's gradient"),
    "context parallel": (CP, "sketch", (1, 1), 4, RANK.format(1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_has_nan_is_named_and_nothing_else(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    layout, gram, where, wrong, who = CASES[name]
    run_ranks(layout.world, step, layout, gram, where, wrong)
    said = re.findall(r"megatron_dr: step 0: (.*) has NaN or Inf", capfd.readouterr().out)
    assert said == [who]


ONE = Layout(per_token=True)
GENERAL = "the general gradient of data-parallel rank {}, microbatch {}, sample {},"
SAMPLES = {  # case, microbatch (the target's own two come first), its sample, who is named
    "exact": (Case(alpha=0.0), 3, 2, GENERAL.format(0, 1, 2)),
    "target": (Case(alpha=0.0), 0, 1, "the target's gradient"),
    "ghost cone": (Case(set="cone", norm="general", score="ghost"), 2, 0, GENERAL.format(0, 0, 0)),
    "merged": (Case(target_pass="merged", score="ghost"), 1, 1, GENERAL.format(0, 1, 1)),
    "merged target": (Case(target_pass="merged"), 1, 4, "the target's gradient"),
    "model": (Case(blocks="model", set="hull", norm="none"), 2, 1, GENERAL.format(0, 0, 1)),
    "step": (Case(window="step", passes=2, score="ghost"), 3, 0, GENERAL.format(0, 1, 0)),
    "step target": (Case(window="step", passes=2, score="ghost"), 1, 0, "the target's gradient"),
    "streaming": (Case(window="streaming"), 3, 1, GENERAL.format(0, 1, 1)),
}


def bad_sample(calls: list[int], wrong: int, sample: int, data: Any, module: Any) -> Any:
    output, loss = _samples.forward_step(data, module)
    calls.append(1)
    if len(calls) == wrong + 1:
        wrong_b1 = torch.arange(len(output))[:, None] == sample
        output.register_hook(lambda dy: torch.where(wrong_b1, torch.nan, dy))
    return output, loss


def sample_step(layout: Layout, case: Case, wrong: int, sample: int, where: int = 0,
                steps: int = 1, stops: bool = True) -> dict[str, float]:  # fmt: skip
    """On a rank: steps with a bad sample in the last one, on data rank `where`."""
    model, optimizer, config = _megatron.build(layout, _oracle.initial(layout))
    model[0].ddp_config.check_for_nan_in_grad = stops
    handle = megatron_dr.attach(model, optimizer, config, DRConfig(rows="sample", **vars(case)))
    rank, merged = parallel_state.get_data_parallel_rank(), case.target_pass == "merged"
    size = _samples.TARGETS if merged else _samples.SAMPLES
    for step in range(steps):
        general, target = (
            iter([_samples.batch(layout, role, step, rank, n, of) for n in range(2)])
            for role, of in (("general", _samples.SAMPLES), ("target", size))
        )
        model[0].zero_grad_buffer()
        last = step == steps - 1
        bad = wrong if last and rank == where else -1
        words = "NaN" if rank == where else None  # another rank may only see that one leave
        expected = pytest.raises(Exception, match=words) if last and stops else nullcontext()
        with expected:
            handle.step(
                get_forward_backward_func(), data_iterator=general, model=model[0],
                forward_step_func=partial(bad_sample, [], bad, sample), num_microbatches=2,
                seq_length=_data.LENGTH, micro_batch_size=_samples.SAMPLES, forward_only=False,
                target_data_iterator=target, num_target_microbatches=2,
                target_micro_batch_size=size,
            )  # fmt: skip
    assert stops or not all(p.main_grad.isfinite().all() for p in model[0].parameters())
    return {name: float(value) for name, value in handle.metrics.items()}


def test_a_bad_sample_is_named_and_shows_in_every_metric(capfd: pytest.CaptureFixture[str]) -> None:
    def every() -> dict[str, dict[str, float]]:
        _megatron.initialize(ONE)
        found = {}
        for name, (case, wrong, sample, _) in SAMPLES.items():
            print(f"case {name}:", flush=True)
            sample_step(ONE, case, wrong, sample)
            found[name] = sample_step(ONE, case, wrong, sample, stops=False)
        return found

    metrics = run_ranks(1, every)[0]
    said = capfd.readouterr().out.split("case ")[1:]
    for name, text in zip(SAMPLES, said, strict=True):
        assert re.findall(r"step 0: (.*) has NaN or Inf", text) == [SAMPLES[name][-1]], name
        about = {k: v for k, v in metrics[name].items() if k != "dr bytes" and " ms" not in k}
        assert "dr rows" in about and all(math.isnan(value) for value in about.values()), name


@pytest.mark.parametrize("overlap", (False, True))
def test_a_bad_sample_of_another_rank(overlap: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """With overlap each rank finds its own bad gradient in the backward, and stops there."""

    def step(layout: Layout, wrong: int) -> None:
        _megatron.initialize(layout)
        sample_step(layout, Case(alpha=0.0), wrong, 1, where=1 if layout.dp > 1 else 0, steps=2)

    layout = Layout(dp=2, overlap=overlap)
    who = "the target's gradient" if overlap else GENERAL.format(1, 1, 1)
    run_ranks(2, step, layout, 0 if overlap else 3)
    said = re.findall(r"step 1: (.*) has NaN or Inf", capfd.readouterr().out)
    assert set(said) == {who} and len(said) <= 2
    if overlap:
        run_ranks(1, step, replace(layout, dp=1), 3)
        said = re.findall(r"step 1: (.*) has NaN or Inf", capfd.readouterr().out)
        assert said == [GENERAL.format(0, 1, 1)]
