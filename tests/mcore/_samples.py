"""Sample rows on Megatron's model in a layout. What is right says `_sample_oracle`.

A step has `dp` ranks x MICROBATCHES general microbatches of SAMPLES sequences, and target ones of
TARGETS sequences, either by themselves or at the end of each general one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.data import packed

from . import _data, _megatron
from ._data import Layout
from ._oracle import Parameters

MICROBATCHES, SAMPLES, TARGETS = 2, 3, 2


@dataclass(frozen=True)
class Case:
    """How samples are weighed: names as in DRConfig."""

    set: str = "topk"
    fraction: float = 0.7  # 2 of 3
    step_length: float = 0.0
    alpha: float = 0.1
    beta: float = 0.0
    norm: str = "tokens"
    blocks: str = "matrix"
    score: str = "exact"
    window: str = "microbatch"
    target_pass: str = "own"
    passes: int = 1
    target_refresh: int = 1
    kronecker_out: int = 6
    kronecker_in: int = 5
    seed: int = 3


def batch(layout: Layout, role: str, step: int, rank: int, number: int, samples: int) -> dict:
    row = rank * MICROBATCHES + number
    if layout.packed:  # packs of different numbers of samples
        samples = 2 + (row + step) % 2
    sequences = [_data.sequence(role, step, row, n, layout.full_masks) for n in range(samples)]
    return {key: torch.stack([s[key] for s in sequences]) for key in sequences[0]}


# -- Megatron --------------------------------------------------------------------------------------
def forward_step(data_iterator: Any, model: Any) -> Any:
    data = next(data_iterator)
    if "cu_seqlens" in data:
        output = model(data["tokens"], data["position_ids"], None, labels=data["labels"],
                       packed_seq_params=packed.parameters(data))  # fmt: skip
        return output, partial(_megatron.loss_func, data["loss_mask"])
    data["attention_mask"] = None
    group = parallel_state.get_context_parallel_group()
    data = compat.batch_on_cp_ranks(data, group)
    output = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
    return output, partial(_megatron.loss_func, data["loss_mask"])


def train(layout: Layout, case: Case, steps: int, initial: Parameters) -> Any:
    """On a rank: parameters' pieces and the log's values of each step."""
    _megatron.initialize(layout)
    model, optimizer, config = _megatron.build(layout, initial)
    dr = DRConfig(rows="sample", packed=layout.packed, **vars(case))
    handle = megatron_dr.attach(model, optimizer, config, dr)
    size, length = (1, _data.PACK) if layout.packed else (SAMPLES, _data.LENGTH)
    rank, function, log = parallel_state.get_data_parallel_rank(), get_forward_backward_func(), []
    for step in range(steps):
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        general = [batch(layout, "general", step, rank, n, SAMPLES) for n in range(MICROBATCHES)]
        wanted = MICROBATCHES if step % case.target_refresh == 0 else 0
        target = [batch(layout, "target", step, rank, n, TARGETS) for n in range(wanted)]
        if case.target_pass == "own":  # Megatron's schedules have one microbatch size
            target = [batch(layout, "target", step, rank, n, SAMPLES) for n in range(wanted)]
        if layout.packed:
            general, target = ([_data.pack(b) for b in role] for role in (general, target))
        iterators = [[iter(b) for _ in model] for b in (general, target)]
        g, t = iterators if layout.vpp else [i[0] for i in iterators]
        reports = handle.step(
            function, forward_step_func=forward_step, data_iterator=g,
            model=model if layout.vpp else model[0], num_microbatches=MICROBATCHES,
            seq_length=length, micro_batch_size=size, forward_only=False,
            target_data_iterator=t, num_target_microbatches=wanted,
            target_micro_batch_size=TARGETS if case.target_pass == "merged" else size,
            target_sets=_megatron.target_sets(layout, wanted),
        )  # fmt: skip
        log.append(_megatron.logged(reports))
        optimizer.step()
    if layout.overlap_param_gather:
        for chunk in model:
            chunk.disable_forward_pre_hook()
    return _megatron.pieces(model, config), log
