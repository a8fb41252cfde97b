"""Pure mathematics of the projection: imports torch and nothing else of ours."""

from megatron_dr.projection.alpha import alpha_at, safest_alpha
from megatron_dr.projection.blocks import UNPROJECTED, block_of
from megatron_dr.projection.feasible_sets import (
    Ball,
    Capped,
    Cone,
    FeasibleSet,
    Halfspace,
    Hull,
    Mean,
    Span,
    Target,
)
from megatron_dr.projection.gram import gram_of, gram_of_long, split
from megatron_dr.projection.kronecker import Kronecker
from megatron_dr.projection.measures import norm_scale, report, report_sums
from megatron_dr.projection.selection import Filter, Greedy, TopK
from megatron_dr.projection.sketch import CountSketch, key_of
from megatron_dr.projection.sketch_error import gram_and_error, size_for
from megatron_dr.projection.solvers import kkt_residual, solve_qp
from megatron_dr.projection.update import Update, project

__all__ = [
    "Ball", "Capped", "Cone", "CountSketch", "FeasibleSet", "Filter", "Greedy", "Halfspace",
    "Hull", "Kronecker", "Mean", "Span", "Target", "TopK", "UNPROJECTED", "Update", "alpha_at",
    "block_of", "gram_and_error", "gram_of", "gram_of_long", "key_of", "kkt_residual",
    "norm_scale", "project", "report", "report_sums", "safest_alpha", "size_for", "solve_qp",
    "split",
]  # fmt: skip
