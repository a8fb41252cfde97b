"""What a parameter's backward does with its samples: the observer of the taps.

A *mode* says what happens when all uses of a parameter in a microbatch are known: weights at once
(`immediate.py`), or kept for the step's end or a second pass (`deferred.py`). The target's own
microbatches come first; their features add up to the target's.
"""

from typing import Any, Protocol

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import meter
from megatron_dr.mcore.layer_rows import scoring
from megatron_dr.mcore.layer_rows.microbatches import Microbatches
from megatron_dr.mcore.layer_rows.packs import Packs
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.layer_rows.scoring import Use
from megatron_dr.mcore.layer_rows.targets import Targets
from megatron_dr.mcore.layer_rows.weigh import kept
from megatron_dr.mcore.ownership import OwnedParameter
from megatron_dr.projection import per_sample


class Mode(Protocol):
    """One way to find coefficients."""

    def coefficients(self, place: Place, microbatch: int, uses: list[Use]) -> torch.Tensor | None:
        """[N] of a general microbatch's samples, or None: no gradient now."""


class SamplePath:
    """The taps' observer, for one model.

    Args:
        owned: the parameters that are trained.

    Attributes:
        targets: the target's features, where it has a pass of its own.
        active: whether a training step is under way.
        asks_all: whether Megatron asks each backward for every parameter's gradient, as it does
            where it reduces gradients during the last one.
    """

    def __init__(self, dr: DRConfig, owned: list[OwnedParameter]) -> None:
        self.dr, self.targets, self.active, self.asks_all = dr, Targets(), False, False
        self._covered = {id(o.parameter) for o in owned}
        self._place: dict[int, Place] = {}
        self._current: dict[int, int] = {}
        self._held: dict[int, list[Use]] = {}
        self._mode: Mode | None = None
        self._num_target = self._merged = 0
        self._alpha = self._target_scale = 0.0
        self._packs: tuple[Packs, Packs] | None = None

    def set_places(self, places: list[Place]) -> None:
        """Before the first step, and where a step's microbatches change their shape."""
        self._place = {id(p.owned.parameter): p for p in places}
        self.targets = Targets(places)

    # -- a pass ----------------------------------------------------------------------------------
    def begin(
        self, mode: Mode, num_target: int, batches: Microbatches, alpha: float, target_scale: float
    ) -> None:
        """Start a schedule call.

        Args:
            num_target: the target's own microbatches, which come first.
            target_scale: of a target microbatch's gradient in the update, alpha included; 0: none.
        """
        self._packs, self._merged = batches.packs, batches.merged
        self._mode, self._num_target = mode, num_target
        self._alpha, self._target_scale = alpha, target_scale
        self._current.clear()
        self._held.clear()
        self.active = True

    def end(self) -> None:
        self.active = False
        self._mode = None
        self._held.clear()

    def enter(self, chunk: int, microbatch: int, backward: bool) -> None:
        """In a router's place: a microbatch's forward or backward begins on a chunk."""
        if not backward:
            return
        self._current[chunk] = microbatch
        if microbatch == self._num_target and self._num_target:
            self.targets.reduce(chunk)

    # -- what the taps call ----------------------------------------------------------------------
    def covers(self, parameter: torch.nn.Parameter) -> bool:
        """Whether the parameter is trained."""
        return id(parameter) in self._covered

    def linear(
        self, parameter: torch.nn.Parameter, x_LNI: torch.Tensor, dy_LNO: torch.Tensor
    ) -> per_sample.Weighted | None:
        """The weight gradient's operands, without the samples that have no part in it; None: no
        gradient now."""
        x_LNI, dy_LNO = self._split(parameter, x_LNI), self._split(parameter, dy_LNO)
        decided = self._decide(parameter, (x_LNI.detach(), dy_LNO))
        place = self._place[id(parameter)]
        if decided is None:
            if not self.asks_all or place.uses > 1:  # the last use gives one
                return None
            none_N = torch.empty(0, dtype=torch.int64, device=x_LNI.device)
            return per_sample.Weighted(x_LNI, dy_LNO, None, none_N)
        coefficient_N, _ = decided
        if self._current[place.owned.chunk] < self._num_target:  # all of the target's samples
            return per_sample.Weighted(x_LNI, dy_LNO, coefficient_N, None)
        with meter.part("combine"):
            keep_N = kept(self.dr, coefficient_N, self._merged, self._alpha)
            every = len(keep_N) == len(coefficient_N)
            return per_sample.Weighted(x_LNI, dy_LNO, coefficient_N, None if every else keep_N)

    def vector(self, parameter: torch.nn.Parameter, g_NH: torch.Tensor) -> torch.Tensor | None:
        """The gradient [H] of the samples' g_NH, or None for no gradient now."""
        decided = self._decide(parameter, (g_NH, None))
        return None if decided is None else decided[0].to(g_NH) @ g_NH

    def embedding(
        self, parameter: torch.nn.Parameter, x_LNH: torch.Tensor, index_LN: torch.Tensor
    ) -> torch.Tensor | None:
        """The gradient [V, H] of rows index, or None for no gradient now."""
        x_LNH, index_LN = self._split(parameter, x_LNH), self._split(parameter, index_LN, -1)
        decided = self._decide(parameter, (x_LNH, index_LN))
        if decided is None:
            return None
        return gradient_of(decided[1], decided[0], parameter.shape[0])

    @property
    def packed(self) -> bool:
        """Whether a microbatch is a pack of samples."""
        return self._packs is not None

    def per_sample(self, parameter: torch.nn.Parameter, g_LNH: torch.Tensor) -> torch.Tensor:
        """Tokens [L, N, ..., H] summed to samples [N, H]."""
        pack = self._pack(parameter)
        if pack is None:
            g_LNH = self._together(g_LNH)
            return g_LNH.sum([d for d in range(g_LNH.dim() - 1) if d != 1])
        packs, number = pack
        return packs.sums(number, g_LNH.sum(list(range(1, g_LNH.dim() - 1))))

    def _split(
        self, parameter: torch.nn.Parameter, tokens_L1: torch.Tensor, pad: float = 0
    ) -> torch.Tensor:
        """Tokens by sample [L, N, ...]: a pack's [T, 1, ...] are taken apart."""
        pack = self._pack(parameter)
        if pack is None:
            return self._together(tokens_L1)
        return pack[0].split(pack[1], tokens_L1[:, 0], pad)

    def _together(self, tokens_LB: torch.Tensor) -> torch.Tensor:
        """[L, S N, ...] as [L S, N, ...], S sequences of a sample: all samples' first, then all
        samples' second ones, so that it is a view."""
        if self.dr.sequences == 1:
            return tokens_LB
        tokens_LSN: torch.Tensor = tokens_LB.unflatten(1, (self.dr.sequences, -1))
        return tokens_LSN.flatten(0, 1)

    def _pack(self, parameter: torch.nn.Parameter) -> tuple[Packs, int] | None:
        """The pack under way, as a role's packs and its number among them."""
        if self._packs is None:
            return None
        number = self._current[self._place[id(parameter)].owned.chunk] - self._num_target
        general, target = self._packs
        return (general, number) if number >= 0 else (target, number + self._num_target)

    def _decide(
        self, parameter: torch.nn.Parameter, use: Use
    ) -> tuple[torch.Tensor, list[Use]] | None:
        """Coefficients [N] and all uses, once the last use of the microbatch is known."""
        place = self._place[id(parameter)]
        uses = [*self._held.pop(place.number, []), use]
        if len(uses) < place.uses:
            self._held[place.number] = uses
            return None
        microbatch = self._current[place.owned.chunk]
        assert self._mode is not None
        if microbatch < self._num_target:
            if self.targets.wanted:
                with meter.part("sketch"):
                    self.targets.add(place, uses, microbatch)
            if not self._target_scale:
                return None
            samples = use[0].shape[0 if place.is_vector else 1]
            coefficient_N = use[0].new_full((samples,), self._target_scale, dtype=torch.float32)
            return coefficient_N, uses
        with meter.part("sketch"):
            found_N = self._mode.coefficients(place, microbatch - self._num_target, uses)
        return None if found_N is None else (found_N, uses)


def gradient_of(
    uses: list[Use], coefficient_N: torch.Tensor, out: int, keep_N: torch.Tensor | None = None
) -> torch.Tensor:
    """sum over samples of coefficient_n G_n: [O, I], or [H] of a vector.

    Args:
        keep_N: numbers of the samples whose coefficient is not 0; None: all samples enter.
    """
    total: Any = 0
    for x, dy in uses:
        if dy is None:
            total = total + coefficient_N.to(x) @ x
        elif dy.is_floating_point():
            total = total + per_sample.Weighted(x, dy, coefficient_N, keep_N).product()
        else:
            x_scaled = x * coefficient_N.to(x)[None, :, None]
            total = total + scoring.gradient(x_scaled.flatten(0, 1), dy.flatten(), out)
    return total  # type: ignore[no-any-return]
