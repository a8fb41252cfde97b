"""The feasible sets and the kinds of rows: the only two tables of their names."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dr import projection
from megatron_dr.config.named import resolved
from megatron_dr.projection import FeasibleSet

# A new feasible set is one class and one row here, or a class of `module:Class`.
FEASIBLE_SETS: dict[str, type[FeasibleSet]] = {
    "mean": projection.Mean, "target": projection.Target, "topk": projection.TopK,
    "greedy": projection.Greedy, "filter": projection.Filter, "capped": projection.Capped,
    "hull": projection.Hull, "cone": projection.Cone, "span": projection.Span,
    "ball": projection.Ball, "halfspace": projection.Halfspace,
}  # fmt: skip


@functools.cache
def set_named(name: str) -> type[FeasibleSet]:
    """The class of a name of `FEASIBLE_SETS`, or a user's own of `module:Class`.

    Raises:
        ValueError: there is no such class, or it is no feasible set.
    """
    if name in FEASIBLE_SETS:
        return FEASIBLE_SETS[name]
    if ":" not in str(name):
        raise ValueError(
            f"set must be one of {', '.join(FEASIBLE_SETS)}, or module:Class of your own, "
            f"not {name!r}."
        )
    found = resolved("set", name, "class")
    is_set = inspect.isclass(found) and issubclass(found, FeasibleSet)
    if not is_set or inspect.isabstract(found):
        raise ValueError(
            f"set {name!r} is no feasible set: derive the class from "
            "megatron_dr.projection.FeasibleSet and give it weights(gram_BMM, cross_BM)."
        )
    return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class RowKind:
    """A kind of rows.

    Attributes:
        dials: fields of `DRConfig` that mean something with it, and not with every kind.
        in_layers: its rows are made inside the layers' backward; else in gradient buffers.
        named: its rows have the names of the general corpora.
        target_ranks: some ranks may run the target's microbatches alone.
        at_attach: which kind it is, only the run can say: `attach` settles it.
        num_slots: general gradient buffers of a rank, of its `DRConfig`.
    """

    dials: tuple[str, ...]
    in_layers: bool = False
    named: bool = False
    target_ranks: bool = False
    at_attach: bool = False
    num_slots: Callable[[Any], int] = lambda _: 1


ROW_KINDS = {
    "auto": RowKind(
        ("row_ranks", "slot_dtype", "gram", "sketch_size", "memory"), at_attach=True
    ),
    "rank": RowKind(("row_ranks", "gram", "sketch_size"), target_ranks=True),
    "slot": RowKind(
        ("slots", "row_ranks", "slot_dtype", "gram", "sketch_size"),
        num_slots=lambda config: config.slots,
    ),
    "domain": RowKind(
        ("slot_dtype", "gram", "sketch_size"), named=True,
        num_slots=lambda config: len(config.domains),
    ),
    "sample": RowKind(
        ("score", "kronecker_out", "kronecker_in", "window", "passes", "target_pass",
         "target_refresh"),
        in_layers=True,
    ),
}  # fmt: skip
