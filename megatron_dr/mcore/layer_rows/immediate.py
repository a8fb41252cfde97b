"""Weights inside the backward: each matrix by itself, samples of one microbatch competing.

With the window `streaming` the samples of all microbatches compete through a running threshold
per block: a sample is kept where its score c_i / |t|^2 is above an exponential average of the
microbatches' (1 - f) quantiles, and has the weight 1 / (f M) that it has in a set of exactly f M.
"""

import torch
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat, meter
from megatron_dr.mcore.layer_rows import scoring
from megatron_dr.mcore.layer_rows.estimate import Estimate
from megatron_dr.mcore.layer_rows.factors import Factors
from megatron_dr.mcore.layer_rows.microbatches import Microbatches
from megatron_dr.mcore.layer_rows.notes import NotFinite
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.layer_rows.scoring import Use
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.mcore.layer_rows.targets import Targets
from megatron_dr.mcore.layer_rows.weigh import needs_rows, sample_map
from megatron_dr.mcore.step.log import StepLog
from megatron_dr.projection import project
from megatron_dr.projection.solvers import spoil

_KEEP = 0.9  # of the running threshold at each microbatch


class Immediate:
    """A mode of `path.SamplePath`.

    Args:
        thresholds: [B] of the streaming window, NaN where there is none yet; changed in place.
        log, seen, estimate: of the step.
    """

    def __init__(
        self, dr: DRConfig, targets: Targets, batches: Microbatches, factors: Factors, alpha: float,
        thresholds: torch.Tensor, log: StepLog, seen: NotFinite, estimate: Estimate,
    ) -> None:  # fmt: skip
        self.dr, self.targets, self.merged, self.alpha = dr, targets, batches.merged, alpha
        self.tokens, self.counts, self.ratio = batches.tokens, batches.counts, factors.ratio
        self.scale = [factors.scale * scale for scale in factors.row_scale]
        self.thresholds, self.log, self.seen = thresholds, log, seen
        self.estimate = estimate
        self.peers = experts.windows(self.tokens, self.ratio)
        self.batches = batches

    def coefficients(self, place: Place, microbatch: int, uses: list[Use]) -> torch.Tensor:
        tokens, ratios = self.peers if place.owned.is_expert else (self.tokens, self.ratio)
        tokens_M, ratio = tokens[microbatch], ratios[microbatch]
        map_RN = sample_map(len(tokens_M), self.merged, ratio, tokens_M.device)
        if self.counts[microbatch] < self.tokens.shape[1]:  # of a pack
            M = self.counts[microbatch]
            map_RN = sample_map(len(tokens_M), 0, ratio, tokens_M.device, M)
            map_RN, tokens_M = map_RN[[*range(M), -1]], tokens_M[:M]
        target = None if self.merged else self.targets.of(place) * ratio
        gram_RR = scoring.gram(place, uses, map_RN, target, needs_rows(self.dr), self.estimate)
        if place.gram_group is not None:
            with meter.part("exchange"):
                collectives.all_reduce(gram_RR, place.gram_group)
        self.seen.see(microbatch, gram_RR)
        share_M = tokens_M / tokens_M.sum().clamp(min=1)
        weights = self._streamed(place, gram_RR) if self.dr.window == "streaming" else None
        with meter.part("solve"):
            update = project(
                gram_RR[None], self.dr.feasible_set(), self.dr.norm, self.alpha, share_M, weights,
                self.dr.beta,
            )  # fmt: skip
        # ranks that share a weight's shards or its samples' tokens have the same: one logs it
        if place.speaks:
            self.log.add(update, [place.block], self._numbers(place, microbatch))
        return self.scale[microbatch] * (update.update_BR[0] @ map_RN)

    def _numbers(self, place: Place, microbatch: int) -> torch.Tensor | None:
        if not self.log.keeps:
            return None
        ranks = [parallel_state.get_data_parallel_rank()]
        ranks = experts.data_ranks() if place.owned.is_expert else ranks
        return self.batches.numbers(microbatch, ranks, self.counts[microbatch])

    def _streamed(self, place: Place, gram_RR: torch.Tensor) -> torch.Tensor:
        """Weights [1, M]. Scores that are not finite leave the threshold as it was."""
        cross_M, square = gram_RR[:-1, -1].double(), gram_RR[-1, -1].double()
        score_M = cross_M / square.clamp(min=1e-300)
        own = score_M.quantile(1.0 - self.dr.fraction, interpolation="midpoint")
        before = self.thresholds[place.block]
        threshold = torch.where(before.isnan(), own, before)
        moved = _KEEP * threshold + (1.0 - _KEEP) * own
        self.thresholds[place.block] = torch.where(own.isfinite(), moved, before)
        weights_1M = (score_M > threshold).double()[None] / (self.dr.fraction * len(score_M))
        return spoil(weights_1M, gram_RR[None], cross_M[None])


def agree(thresholds: torch.Tensor) -> None:
    """The mean over the ranks that have a threshold, on all ranks, at a step's end (collective)."""
    both = torch.stack([thresholds.nan_to_num(0.0), (~thresholds.isnan()).to(thresholds)])
    for group in (compat.data_group(), compat.model_group()):
        collectives.all_reduce(both, group)
    thresholds.copy_(torch.where(both[1] > 0, both[0] / both[1], float("nan")))
