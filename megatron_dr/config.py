"""The plugin's configuration: one frozen, validated dataclass. The flags are derived from it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from megatron_dr.projection import Capped, Cone, FeasibleSet, Hull, Mean, Span, Target, TopK

# The only string -> class table: a new feasible set is one class and one row here.
FEASIBLE_SETS: dict[str, Callable[["DRConfig"], FeasibleSet]] = {
    "mean": lambda c: Mean(),
    "target": lambda c: Target(),
    "topk": lambda c: TopK(c.fraction),
    "capped": lambda c: Capped(c.fraction, c.ridge),
    "hull": lambda c: Hull(c.ridge),
    "cone": lambda c: Cone(c.ridge),
    "span": lambda c: Span(c.ridge),
}

SetName = Literal["mean", "target", "topk", "capped", "hull", "cone", "span"]


def _dial(default: Any, help: str, unit: str) -> Any:
    return field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True)
class DRConfig:
    """What is projected on what, per block of parameters (the problem: `projection/feasible_sets`).

    Raises:
        ValueError: a dial out of range, in one sentence that says what is allowed.
    """

    set: SetName = _dial("cone", "feasible set: which combinations of the rows are allowed", "name")
    fraction: float = _dial(
        0.25, "f of topk (share kept) and capped (weights <= 1/fM)", "share, 0 < f <= 1"
    )
    ridge: float = _dial(
        0.3, "rho of capped, hull, cone and span, relative to tr(G)/M", "factor, >= 0"
    )
    alpha: float = _dial(
        0.05, "a: how much of the target's own gradient, (1 - a) d + a t", "share, 0 to 1"
    )
    norm: Literal["none", "general", "target"] = _dial(
        "general", "length of the projected gradient d, per block: |mean row| or |t|", "name"
    )
    rows: Literal["rank", "slot"] = _dial(
        "slot", "a row is a data-parallel rank's gradient, or one slot of its microbatches", "name"
    )
    slots: int = _dial(8, "slots per rank; each beyond the first keeps a gradient buffer", "count")
    slot_dtype: Literal["fp32", "bf16"] = _dial("fp32", "storage of the slots' buffers", "dtype")
    blocks: Literal["model", "layer", "matrix"] = _dial(
        "model", "which parameters are projected together", "name"
    )
    sketch_size: int = _dial(8192, "K: elements per row and block; a power of two", "elements")
    exact: bool = _dial(False, "keep rows whole instead of sketching (small models, tests)", "flag")
    seed: int = _dial(0, "seed of the sketches; each step uses seed and step", "integer")

    def __post_init__(self) -> None:
        for name, allowed in _choices().items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}."
                )
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must be in [0, 1], not {self.alpha}.")
        if self.slots < 1:
            raise ValueError(f"slots must be at least 1, not {self.slots}.")
        if self.rows == "slot" and self.slots == 1:
            raise ValueError("rows='slot' with slots=1 is rows='rank': say rows='rank'.")
        size = self.sketch_size
        if not 2 <= size <= 2**31 or size & (size - 1):
            raise ValueError(f"sketch_size must be a power of two up to 2**31, not {size}.")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must be in (0, 1], not {self.fraction}.")
        if not 0.0 <= self.ridge < float("inf"):
            raise ValueError(f"ridge must be finite and at least 0, not {self.ridge}.")

    def feasible_set(self) -> FeasibleSet:
        """The set as an object, with its dials."""
        return FEASIBLE_SETS[self.set](self)

    @property
    def num_slots(self) -> int:
        """Slots per rank: 1 with rank rows, and for the sets that weigh no rows."""
        weighs = self.set not in ("mean", "target")
        return self.slots if self.rows == "slot" and weighs else 1

    @property
    def target_share(self) -> float:
        """alpha, except for the set `target`, whose update is t itself."""
        return 1.0 if self.set == "target" else self.alpha

    def needs_target(self) -> bool:
        """Whether a step without a target batch makes no sense."""
        return self.set != "mean"


@dataclass(frozen=True)
class TargetConfig:
    """Where the target role's data comes from (flags of the training entry)."""

    target_data: str | None = _dial(
        None, "target set: a .jsonl file, or the prefix of an indexed dataset", "path"
    )
    target_batch_size: int = _dial(8, "target sequences per step, over all data ranks", "sequences")
    target_valid_data: str | None = _dial(
        None, "held-out target set, evaluated with Megatron's validation", "path"
    )
    metrics: str | None = _dial(
        None, "write one JSON line per training step and validation to this file", "path"
    )

    def __post_init__(self) -> None:
        if self.target_batch_size < 1:
            raise ValueError(f"target_batch_size must be at least 1, not {self.target_batch_size}.")


def _choices() -> dict[str, tuple[str, ...]]:
    """Fields of DRConfig that take one of a list of names."""
    return {
        f.name: get_args(f.type)
        for f in dataclasses.fields(DRConfig)
        if get_origin(f.type) is Literal
    }
