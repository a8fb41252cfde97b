"""Weights at the end of a step: blocks of several parameters, or samples of the whole step.

In the backward each parameter leaves its part of the window's gram, or its samples' features. At
the end of the schedule call the parts are summed over tensor x pipeline ranks and solved at once.
Then either the uses that were kept become weight gradients (one pass), or a second pass runs with
the coefficients known (`Replay`).
"""

import functools
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat, meter
from megatron_dr.mcore.layer_rows import halves, scoring
from megatron_dr.mcore.layer_rows.estimate import Estimate
from megatron_dr.mcore.layer_rows.factors import Factors
from megatron_dr.mcore.layer_rows.microbatches import Microbatches
from megatron_dr.mcore.layer_rows.notes import NotFinite, bad_rows
from megatron_dr.mcore.layer_rows.path import gradient_of
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.layer_rows.scoring import Use
from megatron_dr.mcore.layer_rows.targets import Targets
from megatron_dr.mcore.layer_rows.weigh import needs_rows, sample_map
from megatron_dr.mcore.step.alpha import Shares
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.projection import Update, project


class Deferred:
    """A mode of `path.SamplePath`: see the module.

    Args:
        blocks: number of blocks of the whole model.
        batches: n general microbatches of this rank, of b samples (fewer in packs), and q of the
            target where it is merged.
        signs: of the target's halves, where they are told apart.
        seen, estimate: of the step.
        keep: whether uses are kept for their weight gradients.
    """

    def __init__(
        self, dr: DRConfig, places: list[Place], blocks: int, targets: Targets,
        batches: Microbatches, factors: Factors, seen: NotFinite, keep: bool,
        signs: list[list[float]], estimate: Estimate,
    ) -> None:  # fmt: skip
        self.dr, self.targets, self.merged, self.keep = dr, targets, batches.merged, keep
        self.tokens, self._counts, self.ratio = batches.tokens, batches.counts, factors.ratio
        self._batches = batches
        self.row_scale, self.seen, self.signs = factors.row_scale, seen, signs
        self.estimate = estimate
        (n, b), device = self.tokens.shape, self.tokens.device
        self._samples = b
        self._gram = torch.zeros(n, blocks, b + 1, b + 1, device=device)
        self._features: dict[int, list[torch.Tensor]] = {}
        self._cross: torch.Tensor = torch.zeros(blocks, n * b + 1, device=device)
        self._kept: list[tuple[Place, int, list[Use]]] = []
        self._places = {p.number: p for p in places}

    # -- in the backward -------------------------------------------------------------------------
    def coefficients(self, place: Place, microbatch: int, uses: list[Use]) -> None:
        if self.keep:
            self._kept.append((place, microbatch, uses))
        if self._needs_features(place):
            feature_NK = scoring.summed(place, scoring.features(place, uses))
            self._features.setdefault(place.number, []).append(feature_NK)
            return
        b, map_RN = self._samples, self._map(microbatch)
        target = None if self.merged else self.targets.of(place) * self.ratio[microbatch]
        whole_step = self.dr.window == "step"  # then cross products alone
        rows_too = needs_rows(self.dr) and not whole_step
        gram_RR = place.share * scoring.gram(place, uses, map_RN, target, rows_too, self.estimate)
        if not whole_step:
            self._gram[microbatch, place.block] += gram_RR
            return
        cross_R = gram_RR[-1] / self._counts[microbatch]  # in units of U, not of M U
        self._cross[place.block, microbatch * b : (microbatch + 1) * b] += cross_R[:-1]
        if microbatch == 0:
            self._cross[place.block, -1] += gram_RR[-1, -1]

    def _map(self, microbatch: int) -> torch.Tensor:
        count, ratio = self._counts[microbatch], self.ratio[microbatch]
        return sample_map(self._samples, self.merged, ratio, self.tokens.device, count)

    def _needs_features(self, place: Place) -> bool:
        """Kept to the end: where products need samples of other microbatches, ranks or stages."""
        if place.owned.partial == "embedding":
            return True
        return self.dr.window == "step" and (needs_rows(self.dr) or bool(self.merged))

    # -- after the schedule call -----------------------------------------------------------------
    def solve(self, shares: Callable[..., Shares], log: StepLog) -> tuple[torch.Tensor, Shares]:
        """Coefficients [n, B, N] before the scale, and alpha and beta (collective)."""
        if self.dr.window == "microbatch":
            its = shares(None)
            return self._solve_microbatches(its, log), its
        return self._solve_step(shares, log)

    def _project(
        self, gram_BRR: torch.Tensor, share_M: torch.Tensor, its: Shares, log: StepLog,
        row_M: torch.Tensor | None,
    ) -> Update:  # fmt: skip
        """Of all blocks, once or for several windows; all ranks of the model copy have the same:
        the first one logs it."""
        with meter.part("solve"):
            update = project(
                gram_BRR, self.dr.feasible_set(), self.dr.norm, its.alpha, share_M,
                its.weights_BM, its.beta,
            )  # fmt: skip
        if dist.get_rank(compat.model_group()) == 0:
            blocks = self._gram.shape[1]
            log.add(update, [*range(blocks)] * (len(gram_BRR) // blocks), row_M)
        return update

    def _solve_microbatches(self, its: Shares, log: StepLog) -> torch.Tensor:
        n, b = self.tokens.shape
        for number, parts in self._features.items():
            place = self._places[number]
            for microbatch, feature_NK in enumerate(self._over_stages(place, parts)):
                target = None if self.merged else self._target(place)[0] * self.ratio[microbatch]
                gram_RR = scoring.dense_gram(
                    feature_NK, self._map(microbatch), target, True,
                    functools.partial(self.estimate.see, place),
                )  # fmt: skip
                self._gram[microbatch, place.block] += place.share * gram_RR
        collectives.all_reduce(self._gram, compat.model_group())
        blocks = self._gram.shape[1]
        coefficient_nBN = self._gram.new_zeros(n, blocks, b + self.merged, dtype=torch.float64)
        for count in sorted(set(self._counts)):  # those of as many samples at once
            alike = [number for number, c in enumerate(self._counts) if c == count]
            rows = [*range(count), b]
            gram_nBRR = self._gram[alike][:, :, rows][..., rows]
            for number, gram_BRR in zip(alike, gram_nBRR, strict=True):
                self.seen.see(number, gram_BRR)
            gram_BRR = gram_nBRR.flatten(0, 1)
            share_nM = self.tokens[alike][:, :count]
            share_nM = share_nM / share_nM.sum(1, keepdim=True).clamp(min=1)
            row_BM = self._rows_of(alike, count) if log.keeps else None
            share_BM = share_nM.repeat_interleave(blocks, 0)
            update = self._project(gram_BRR, share_BM, its, log, row_BM)
            update_nBR = update.update_BR.view(len(alike), blocks, -1)
            maps = torch.stack([self._map(number)[rows] for number in alike])
            coefficient_nBN[alike] = torch.einsum("nbr,nrs->nbs", update_nBR, maps)
        return coefficient_nBN

    def _solve_step(
        self, shares: Callable[..., Shares], log: StepLog
    ) -> tuple[torch.Tensor, Shares]:
        n, b = self.tokens.shape
        group = parallel_state.get_data_parallel_group()
        gathered = functools.partial(collectives.gathered, group=group)
        tokens_P = gathered(self.tokens.reshape(-1))  # P places, M of them samples
        count_n = torch.tensor(self._counts, device=self.tokens.device)
        place_b = torch.arange(b, device=count_n.device)
        is_sample_P = gathered((place_b < count_n[:, None]).flatten())
        P, (sample_M,) = len(tokens_P), is_sample_P.nonzero(as_tuple=True)
        M = len(sample_M)
        size = P + 1 + bool(self.signs)  # samples, the target, and its halves' difference
        gram_BRR = self._gram.new_zeros(self._gram.shape[1], size, size)
        for number, parts in self._features.items():
            place = self._places[number]
            gram_BRR[place.block] += place.share * self._step_gram(place, parts, group, M)
        cross_BP = M * gathered(self._cross[:, :-1].t()).t()
        gram_BRR[:, :P, P] += cross_BP
        gram_BRR[:, P, :P] += cross_BP
        gram_BRR[:, P, P] += self._cross[:, -1]
        collectives.all_reduce(gram_BRR, compat.model_group())
        rows_R = torch.cat([sample_M, torch.arange(P, size, device=sample_M.device)])
        share_M = tokens_P[sample_M] / tokens_P.sum().clamp(min=1)
        whole_BRR = gram_BRR[:, rows_R][..., rows_R]
        gram_BRR = whole_BRR[:, : M + 1, : M + 1]
        lacks = halves.lacks(self.dr, M, self.signs)
        if not lacks and self.signs:  # all ranks choose alike, to the last bit
            collectives.from_first(whole_BRR, compat.data_group())
        its = shares(None if lacks else whole_BRR, lacks, share_M)
        rank = dist.get_rank(group)
        speaks = log.keeps and rank == 0  # all data ranks have the same
        row_M = self._numbers(sample_M) if speaks else None
        update = self._project(gram_BRR, share_M, its, log, row_M)
        weight_BP = update.update_BR.new_zeros(len(gram_BRR), P)
        weight_BP[:, sample_M] = update.update_BR[:, :-1] * M
        bad_R = bad_rows(gram_BRR)
        here = slice(rank * n * b, (rank + 1) * n * b)
        bad_P = is_sample_P.index_put((sample_M,), bad_R[:-1])
        self.seen.see_step(bad_P[here].view(n, b), bad_R[-1])
        coefficient_nBN = weight_BP[:, here].view(-1, n, b).transpose(0, 1)
        if self.merged:
            ratio_n = torch.tensor(self.ratio, dtype=torch.float64, device=count_n.device)
            target_nB = ratio_n[:, None] * update.update_BR[None, :, -1]
            target_nBq = target_nB[:, :, None].expand(-1, -1, self.merged)
            coefficient_nBN = torch.cat([coefficient_nBN, target_nBq], 2)
        return coefficient_nBN, its

    def _rows_of(self, microbatches: list[int], count: int) -> torch.Tensor:
        """Of the samples of each microbatch, for all blocks [B, M]."""
        rank = [parallel_state.get_data_parallel_rank()]
        row_nM = torch.stack([self._batches.numbers(n, rank, count) for n in microbatches])
        return row_nM.repeat_interleave(self._gram.shape[1], 0)

    def _numbers(self, sample_M: torch.Tensor) -> torch.Tensor:
        """Of the samples at these places of all data ranks, one rank's after the other's."""
        n, b = self.tokens.shape
        rank_M, own_M = sample_M // (n * b), sample_M % (n * b)
        data = parallel_state.get_data_parallel_world_size()
        number_M: torch.Tensor = (own_M // b * data + rank_M) * b + own_M % b
        return number_M

    def _step_gram(
        self, place: Place, parts: list[torch.Tensor], group: collectives.Group, M: int
    ) -> torch.Tensor:
        """gram [R, R] of the step's P places on all data ranks, M of which are samples, the target
        and, where it is halved, its halves' difference."""
        b, parts = self._samples, self._over_stages(place, parts)
        parts = [f * scale for f, scale in zip(parts, self.row_scale, strict=True)]
        rows_MK = collectives.gathered(torch.cat([f[:b] for f in parts]), group) * float(M)
        if self.merged:
            target_K = sum(r * f[b:].sum(0) for r, f in zip(self.ratio, parts, strict=True))
            assert isinstance(target_K, torch.Tensor)
            both = [target_K]
            if self.signs:
                both.append(halves.difference(self.signs, self.ratio, [f[b:] for f in parts]))
            target_RK = torch.stack(both)
            collectives.all_reduce(target_RK, group)
        else:
            target_RK = self._target(place) * self.ratio[0]
        self.estimate.see(place, rows_MK, target_RK[0])
        rows_RK = torch.cat([rows_MK, target_RK])
        return rows_RK @ rows_RK.t()

    def _over_stages(self, place: Place, parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """A tied embedding's features are summed over the first and the last stage."""
        if place.owned.partial == "embedding":
            for part in parts:
                collectives.all_reduce(part, parallel_state.get_embedding_group())
        return parts

    def _target(self, place: Place) -> torch.Tensor:
        """The target's features [1, K], or with its halves' difference [2, K]."""
        own = [self.targets.of(place), *([self.targets.difference(place)] if self.signs else [])]
        return self._over_stages(place, [torch.stack([part.flatten() for part in own])])[0]

    def write(self, coefficient_nBN: torch.Tensor) -> None:
        """Add the kept uses' weighted gradients to Megatron's buffer, and let go of them."""
        chosen_nBN = coefficient_nBN.cpu() != 0  # the one wait for a GPU
        while self._kept:
            place, microbatch, uses = self._kept.pop()
            parameter = place.owned.parameter
            coefficient_N = coefficient_nBN[microbatch, place.block]
            keep_N = chosen_nBN[microbatch, place.block].nonzero().flatten()
            gradient = gradient_of(
                uses, coefficient_N, parameter.shape[0], keep_N.to(coefficient_N.device)
            )
            parameter.main_grad.add_(gradient)  # type: ignore[attr-defined]


class Replay:
    """The second pass: coefficients [n, B, N] are known."""

    def __init__(self, coefficient_nBN: torch.Tensor) -> None:
        self._coefficient_nBN = coefficient_nBN

    def coefficients(self, place: Place, microbatch: int, uses: list[Use]) -> torch.Tensor:
        return self._coefficient_nBN[microbatch, place.block]
