"""Whose gradient has NaN: the sentence on rank 0, in layouts that name rows differently."""

import re
from functools import partial
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr

from . import _data, _layouts, _megatron
from ._data import Layout
from ._problem import Problem
from ._ranks import run_ranks


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
