"""Rows in gradient buffers, of any layer type: one schedule call, projected before its finalize.

    gram    inner products of all ranks' buffers, exact or sketched (`ExactGram`, `SketchedGram`)
    project the update's coefficients, the same on every rank (`projection/update.py`)
    combine this rank's buffers by these coefficients into Megatron's own, which it then reduces

Legend: B blocks, R = M rows and the target, P buffers of all row groups.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import meter
from megatron_dr.mcore.buffer_rows import maximin, normalisation, notes, row_groups
from megatron_dr.mcore.buffer_rows.bad_rows import BadRows
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.gram_choice import choose
from megatron_dr.mcore.buffer_rows.layout import Layout
from megatron_dr.mcore.buffer_rows.router import RoleRouter
from megatron_dr.mcore.ownership import block_names, owned_parameters
from megatron_dr.mcore.step import schedule
from megatron_dr.mcore.step.alpha import Shares
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.mcore.step.probe import Probe
from megatron_dr.mcore.step.rows import Call, Passes
from megatron_dr.mcore.step.schedule import Finalize, Pass
from megatron_dr.projection import Update, block_of, project

_NONE = Shares(0.0, 0.0)  # of a target that is not there
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class BufferRows:
    """Rows of ranks, slots or domains; see `step.rows.Rows`.

    Attributes:
        update: what the last step did, or None.
    """

    hold = True

    def __init__(self, model: list[Any], config: Any, dr: DRConfig) -> None:
        self.model, self.config, self.dr = model, config, dr
        row_groups.check_routers(dr, config)
        owned = owned_parameters(model, config)
        names = block_names(owned, dr.blocks)
        number = {name: n for n, name in enumerate(names)}
        self.layout = Layout(
            names=names,
            blocks=tuple(number[block_of(o.name, dr.blocks)] for o in owned),
            row_map=row_groups.row_map_of(dr),
        )
        self.buffers = Buffers(owned, model, self.layout.row_map, _DTYPES[dr.slot_dtype])
        self.names, self.device = names[: self.layout.projected], self.buffers.device
        self.offload, self.restore = self.buffers.offload, self.buffers.restore
        self.close = self.buffers.end_step
        self.source, why = choose(dr, self.buffers, self.layout, model)
        self.update: Update | None = None
        notes.attached(dr, self.buffers, self.layout, self.source.target_bytes, why)

    # -- life ------------------------------------------------------------------------------------
    state = None  # every step begins with zeros

    def load(self, state: Any) -> None:
        """Nothing to load."""

    def kept(self, steps: int) -> dict[str, Any]:
        return {}

    def load_kept(self, path: Path, samples: int, tokens: int) -> bool:
        return True

    def forget_target(self) -> None:
        """Every step has its own."""

    # -- a step ----------------------------------------------------------------------------------
    def target_due(self, steps: int) -> bool:
        return True

    def check_batch(self, num_general: int, num_target: int) -> None:
        row_groups.check_batch(self.dr, self.layout.row_map, num_general)
        apart = self.layout.row_map.target_groups > 0  # a rank runs one role's alone
        for target, general in ([(num_target, 0), (0, num_general)] if apart
                                else [(num_target, num_general)]):  # fmt: skip
            schedule.check_number(self.model, target, general)

    def passes(self, call: Call, log: StepLog) -> Passes:
        row_map, num_target, num_general = self.layout.row_map, call.num_target, call.num_general
        maximin.check(row_map, call)
        ranks = 1.0
        if row_map.target_groups:  # a rank has one role
            on_target = self.layout.group < row_map.target_groups
            num_target, num_general = (num_target, 0) if on_target else (0, num_general)
            others = row_map.groups - row_map.target_groups
            ranks = row_map.groups / (row_map.target_groups if on_target else others)
        router = RoleRouter(
            self.model, self.buffers, self.source.backward, num_target, num_general,
            call.target_data, call.domains, call.sets.of if call.sets is not None else (),
        )  # fmt: skip

        def finalize(stock: Finalize, num_tokens: torch.Tensor | None) -> None:
            num_tokens, bad = self._project(router, num_tokens, call, log)
            assert self.update is not None
            log.bad = bad.found(router.bad)
            if self.model[0].ddp_config.check_for_nan_in_grad:  # Megatron waits for it, too
                log.name_bad()
            with self.source.reduced():
                share = self.dr.feasible_set().target_share(self.update.alpha, self.update.beta)
                stock(num_tokens, bad.share(share))

        with_target = call.num_target > 0 and not row_map.target_groups
        router.probe = Probe(self.model, num_target + num_general, self.device)
        self.buffers.begin_step(with_target)
        try:
            with self.source.step(num_target if with_target else 0), router.probe.looking():
                yield Pass(router, finalize, both=not row_map.target_groups, ranks=ranks)
        finally:
            self.buffers.end_step()

    def _project(
        self, router: RoleRouter, num_tokens: torch.Tensor | None, call: Call, log: StepLog
    ) -> tuple[torch.Tensor | None, BadRows]:
        """Rows -> Megatron's buffer. Returns the tokens that Megatron divides by, and what is bad.

        A block that is not projected gets the rows' mean, which is Megatron's own gradient.
        """
        dr, layout, row_map = self.dr, self.layout, self.layout.row_map
        rows = row_map.num_rows
        ratio, role_scale, share_D = normalisation.factors(
            router, row_map, num_tokens is not None, self.device
        )
        if num_tokens is not None:  # Megatron divides by the tokens: the general role's own
            num_tokens = normalisation.general_tokens(router, num_tokens)
        self.buffers.bind(0)
        mix_RP = row_map.mix(ratio, share_D)
        apart = dr.on_bad_gradient == "mean"
        gram = self.source.gram(mix_RP, call.step, apart)
        with meter.part("solve"):
            if row_map.targets > 1 and call.sets is not None:
                gram, mix_RP, weights_K = maximin.of_one(gram, mix_RP, rows, layout.projected)
                for name, weight in zip(call.sets.names, weights_K, strict=True):
                    log.put(f"dr target weight {name}", weight)
            bad = BadRows(apart, gram, layout.projected, rows)
            with_target = row_map.target_groups > 0 or router.num_target > 0
            lacks = row_groups.lacks(dr, row_map, call)
            its = call.shares(None if lacks else bad.seen_BRR, lacks) if with_target else _NONE
            update = project(
                bad.gram_BRR[:, : rows + 1, : rows + 1], dr.feasible_set(), dr.norm, its.alpha,
                None, its.weights_BM, its.beta,
            )  # fmt: skip
            gram_BRR = bad.seen_BRR[:, : rows + 1, : rows + 1].double()
            self.update = update = dataclasses.replace(update, gram_BRR=gram_BRR)
        with meter.part("combine"):
            of_rows_BR = bad.coefficients(layout.of_all_blocks(update.update_BR))
            self.source.combine(of_rows_BR @ mix_RP[: rows + 1] * role_scale, bad.vectors(mix_RP))
        if self.model[0].ddp_config.check_for_nan_in_grad:  # Megatron waits for the device too
            notes.not_finite(gram.finite_R[: rows + 1], layout, dr, call.step)
        if with_target:
            row_M = torch.arange(rows) if dist.get_rank() == 0 else None  # all ranks have the same
            log.add(update, range(len(self.names)), row_M)
        if dr.row_kind.named:
            for name, weight in zip(dr.domains, update.weights_BM.mean(0), strict=True):
                log.put(f"dr weight {name}", weight)
        if gram.error_sq_B is not None:
            length_sq = gram_BRR.square().sum().clamp(min=1e-300)
            error_sq = gram.error_sq_B[: layout.projected].sum()
            log.put("dr sketch error", (error_sq / length_sq).sqrt())
        return num_tokens, bad
