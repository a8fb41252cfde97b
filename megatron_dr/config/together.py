"""Dials of `DRConfig` that don't go together."""

from typing import Any

from megatron_dr.config.fields import must_be
from megatron_dr.config.kinds import set_named


def check_maximin(dr: Any) -> None:
    """Raise ValueError where the target sets' gradients can't be kept apart, or need not be."""
    apart = "targets='maximin' keeps the gradient of each target set in a buffer of its own"
    if dr.row_kind.in_layers or dr.target_ranks:
        what = f"target_ranks={dr.target_ranks}" if dr.target_ranks else f"rows={dr.rows!r}"
        raise ValueError(
            f"{apart}, on ranks that run both roles, and does not go with {what}: take "
            "rows='slot', 'rank' or 'domain' without target ranks, or targets='mean'."
        )
    if dr.alpha_style == "auto":
        raise ValueError(
            f"{apart}, and alpha_style='auto' one for each half of the target: give another style, "
            "or targets='mean'."
        )
    if dr.on_bad_gradient == "mean":
        raise ValueError(
            "targets='maximin' weighs the target sets by all their gradients, so that none can be "
            "left out as on_bad_gradient='mean' does: take 'skip' or 'stop'."
        )


def check_samples(dr: Any) -> None:
    """Raise ValueError for dials that sample rows don't have together."""
    if dr.on_bad_gradient == "mean":
        raise ValueError(
            "on_bad_gradient='mean' needs rows in gradient buffers: rows='sample' adds up "
            "gradients before all are known; take 'skip' or 'stop'."
        )
    for name in ("kronecker_out", "kronecker_in", "target_refresh"):
        number = getattr(dr, name)
        must_be("at least 1", number is None or number >= 1, name, number)
    must_be("1 or 2", dr.passes in (1, 2), "passes", dr.passes)
    own = set_named(dr.set)
    if own.target_weight and own.alpha is None and dr.target_pass == "own":
        raise ValueError(
            f"set={dr.set!r} with sample rows needs target_pass='merged': how much of the "
            "target enters is known only after its own microbatches."
        )
    streams = own.by_score and dr.blocks == "matrix" and dr.passes == 1
    if dr.window == "streaming" and not streams:
        raise ValueError(
            "window='streaming' needs set='topk', blocks='matrix' and passes=1, not "
            f"{dr.set!r}, {dr.blocks!r} and {dr.passes}."
        )
    cached = dr.target_refresh > 1
    if cached and (dr.target_pass == "merged" or dr.alpha or own.alpha):
        raise ValueError(
            "target_refresh above 1 keeps the target's scores, not its gradient: it needs "
            "target_pass='own' and alpha=0."
        )
