"""Pure mathematics of the projection: imports torch and nothing else of ours."""

from megatron_dr.projection.blocks import block_of
from megatron_dr.projection.feasible_sets import (
    Capped,
    Cone,
    FeasibleSet,
    Hull,
    Mean,
    Span,
    Target,
    TopK,
    norm_scale,
    report,
)
from megatron_dr.projection.gram import gram_of, split
from megatron_dr.projection.sketch import CountSketch, ExactRows, Sketch, key_of
from megatron_dr.projection.solvers import kkt_residual, solve_qp

__all__ = [
    "Capped",
    "Cone",
    "CountSketch",
    "ExactRows",
    "FeasibleSet",
    "Hull",
    "Mean",
    "Sketch",
    "Span",
    "Target",
    "TopK",
    "block_of",
    "gram_of",
    "kkt_residual",
    "key_of",
    "norm_scale",
    "report",
    "solve_qp",
    "split",
]
