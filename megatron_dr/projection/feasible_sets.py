"""The sets that a target gradient is projected onto; each maps inner products to weights.

Per block, with the rows J [M, N], the target t [N], G = J J^T and c = J t,

    w = argmin over w in W of  1/2 |J^T w - t|^2 + (ridge/2) tr(G)/M |w - p|^2 ,    d = J^T w

(Hu, Liu, Mao, Ma, Dr. Post-Training, arXiv 2605.07063). A set never sees a gradient. All solve
in float64 and return float64. A block whose gram or cross is not finite gets NaN weights, on
purpose: the host's own handling of bad gradients must see them. (`Mean` and `Target` read no
values; there a bad gradient reaches the host as itself.)

Shape suffixes: M rows, N elements, K sketch size, B blocks, R = M + 1 (rows plus target).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dr.projection.least_squares import solve_ball, solve_ridge
from megatron_dr.projection.solvers import solve_qp, spoil

_VANISHING = 1e-12  # |mean g|^2 relative to the rows' mean |g|^2 that is rounding


class FeasibleSet(ABC):
    """A set of updates d = J^T w + target_weight t, known by the weights of the projection onto it.

    A set says what it needs itself; what it does not say is as in most sets.

    :cvar target_weight: how much of t itself is in d: 0 for the sets {J^T w : w in W}, 1 for the
        two that no rows span (`Target` and `Halfspace`).
    :cvar dials: the fields of `DRConfig` that its constructor takes, by the same names.
    :cvar reads_rows: whether the weights depend on G, beside c.
    :cvar reads_target: whether the update depends on t.
    :cvar weighs_rows: whether rows can get different weights; else one row will do.
    :cvar alpha: a fixed share of t in the update; None: as the configuration says.
    :cvar one_row: what it does where M = 1, in a few words; empty: nothing worth saying.
    :cvar by_score: whether it keeps the rows with the largest c, whatever the other rows are, so
        that a running threshold can stand for it.
    :raises ValueError: a fraction that is not above 0 and at most 1, or a ridge, radius or step
        length that is negative or not finite.
    """

    target_weight: ClassVar[float] = 0.0
    dials: ClassVar[tuple[str, ...]] = ()
    reads_rows: ClassVar[bool] = True
    reads_target: ClassVar[bool] = True
    weighs_rows: ClassVar[bool] = True
    alpha: ClassVar[float | None] = None
    one_row: ClassVar[str] = ""
    by_score: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in self.dials:
            value = getattr(self, name)
            if name == "fraction" and not 0.0 < value <= 1.0:
                raise ValueError(f"fraction is {value}; it must lie above 0 and be at most 1.")
            if name in ("ridge", "radius", "step_length") and not 0.0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be finite and at least 0.")

    @abstractmethod
    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w [B, M] in float64, from G and c."""

    def target_share(self, alpha: Tensor | float, beta: Tensor | float = 0.0) -> Tensor | float:
        """Of the target among all that u = (1 - a) (b s' g + (1 - b) s d) + a t is made of, lengths
        aside: (own + a) / (own + 1), own = (1 - a) (1 - b) tau, tau the target_weight."""
        own = (1.0 - alpha) * (1.0 - beta) * self.target_weight
        return (own + alpha) / (own + 1.0)

    def kept(self, rows: int) -> int | None:
        """How many of M weights are not 0, where that is known before solving."""
        return None

    @property
    def least_rows(self) -> float:
        """Fewest rows with which its dials mean something."""
        return 1.0


@dataclass(frozen=True)
class Mean(FeasibleSet):
    """W = {1/M}: standard training on general data."""

    reads_rows = reads_target = weighs_rows = False

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = 1/M."""
        blocks, rows, _ = gram_BMM.shape
        return gram_BMM.new_full((blocks, rows), 1.0 / rows, dtype=torch.float64)


@dataclass(frozen=True)
class Target(FeasibleSet):
    """The whole space: target-only training, d = t."""

    target_weight = alpha = 1.0
    reads_rows = weighs_rows = False

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = 0, beside t itself."""
        return torch.zeros_like(gram_BMM[..., 0], dtype=torch.float64)


@dataclass(frozen=True)
class Capped(FeasibleSet):
    """W = {0 <= w <= 1/(fraction M), sum w = 1}: the convex hull of all k-subset means, p = 1/M.

    fraction = 1 is `Mean`; 1/M, or less, is `Hull`.
    """

    fraction: float
    ridge: float = 0.0
    dials = ("fraction", "ridge")
    one_row = "capped gives it weight 1: standard training"

    @property
    def least_rows(self) -> float:
        """1/fraction, from where on rows can be left out."""
        return 1.0 / self.fraction

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the capped simplex."""
        kept = self.fraction * cross_BM.shape[1]
        upper = 1.0 / kept if kept > 1.0 else None
        return _ridged_qp(gram_BMM, cross_BM, self.ridge, upper, sum_to=1.0)


@dataclass(frozen=True)
class Hull(FeasibleSet):
    """W = the probability simplex: the convex hull of the rows, p = 1/M."""

    ridge: float = 0.0
    dials = ("ridge",)
    one_row = "hull gives it weight 1: standard training"
    least_rows = 2.0  # one row has weight 1 whatever it is

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the simplex."""
        return _ridged_qp(gram_BMM, cross_BM, self.ridge, upper=None, sum_to=1.0)


@dataclass(frozen=True)
class Cone(FeasibleSet):
    """W = {w >= 0}: the conic hull of the rows, p = 1/M."""

    ridge: float = 0.0
    dials = ("ridge",)
    one_row = "cone keeps its direction where it agrees with the target, else stops it"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """The quadratic program over the non-negative weights; a zero row without ridge: 0."""
        return _ridged_qp(gram_BMM, cross_BM, self.ridge, upper=None, sum_to=None)


@dataclass(frozen=True)
class Span(FeasibleSet):
    """W = R^M: least squares with a ridge towards p = 1/M.

    Without a ridge and with dependent rows, the limit ridge -> 0: of all optimal w the one
    nearest to p. d is the same for all of them. How near the limit, and from which eigenvalue of
    G on: `least_squares.solve_ridge`.
    """

    ridge: float = 0.0
    dials = ("ridge",)
    one_row = "span keeps its line, with the target's sign"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = p + (G + r)^-1 (c - G p), r = ridge tr(G)/M."""
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        scale_B11, p = _trace_scale(gram_BMM), 1.0 / gram_BMM.shape[1]
        right_BM = (cross_BM - p * gram_BMM.sum(2)) / scale_B11[..., 0]
        weights_BM = p + solve_ridge(gram_BMM / scale_B11, right_BM, self.ridge)
        return spoil(weights_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Ball(FeasibleSet):
    """W = {|J^T w - mean| <= radius |mean|}, mean = J^T 1/M: a trust region around `Mean`, p = 1/M.

    The set of directions of CAGrad (Liu, Liu, Jin, Stone, Liu, Conflict-Averse Gradient Descent
    for Multi-task Learning, NeurIPS 2021), which looks in it for another one. radius = 0 is
    `Mean`, and so is a mean of zero; a large radius is `Span`.
    """

    radius: float
    ridge: float = 0.0
    dials = ("radius", "ridge")
    one_row = "ball keeps its direction, longer or shorter"

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w = 1/M + v: least squares in v = w - 1/M with b = c - G 1/M in the ball."""
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        scale_B11 = _trace_scale(gram_BMM)
        right_BM = (cross_BM - gram_BMM.mean(2)) / scale_B11[..., 0]
        mean_B1 = (_mean_sq(gram_BMM)[:, None] / scale_B11[..., 0]).sqrt()
        v_BM = solve_ball(gram_BMM / scale_B11, right_BM, self.ridge, self.radius * mean_B1)
        return spoil(1.0 / gram_BMM.shape[1] + v_BM, gram_BMM, cross_BM)


@dataclass(frozen=True)
class Halfspace(FeasibleSet):
    """{d : d.mean >= 0}, mean = J^T 1/M: t, unless it would undo the general data's progress.

        d = t - min(0, t.mean)/|mean|^2 mean

    A-GEM (Chaudhry, Ranzato, Rohrbach, Elhoseiny, Efficient Lifelong Learning with A-GEM, ICLR
    2019) with the general data as its memory. Where the mean vanishes (|mean|^2 at most
    1e-12 tr(G)/M) every d is allowed and w = 0.
    """

    target_weight = 1.0

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        """w_i = -min(0, mean(c))/|mean|^2 / M, beside t itself."""
        gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
        mean_sq_B = _mean_sq(gram_BMM)
        cross_B = cross_BM.mean(1)
        vanishes_B = mean_sq_B <= _VANISHING * gram_BMM.diagonal(dim1=1, dim2=2).mean(1)
        against_B = -cross_B / mean_sq_B / cross_BM.shape[1]
        weights_B1 = torch.where((cross_B >= 0.0) | vanishes_B, 0.0, against_B)[:, None]
        return spoil(weights_B1.expand_as(cross_BM).contiguous(), gram_BMM, cross_BM)


def _ridged_qp(
    gram_BMM: Tensor, cross_BM: Tensor, ridge: float, upper: float | None, sum_to: float | None
) -> Tensor:
    """With H = G/a + ridge I and l = c/a + ridge/M, a = tr(G)/M: the program divided by a."""
    gram_BMM, cross_BM = gram_BMM.double(), cross_BM.double()
    scale_B11, rows = _trace_scale(gram_BMM), gram_BMM.shape[1]
    identity_MM = torch.eye(rows, dtype=torch.float64, device=gram_BMM.device)
    linear_BM = cross_BM / scale_B11[..., 0] + ridge * (1.0 / rows)
    hessian_BMM = gram_BMM / scale_B11 + ridge * identity_MM
    return solve_qp(hessian_BMM, linear_BM, upper=upper, sum_to=sum_to)


def _trace_scale(gram_BMM: Tensor) -> Tensor:
    """tr(G)/M [B, 1, 1], or 1 where it is zero."""
    scale_B11 = gram_BMM.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    return torch.where(scale_B11 == 0, 1.0, scale_B11)


def _mean_sq(gram_BMM: Tensor) -> Tensor:
    """|mean g|^2 [B]."""
    return gram_BMM.mean((1, 2)).clamp(min=0.0)
