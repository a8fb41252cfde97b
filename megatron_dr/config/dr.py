"""The plugin's configuration: one frozen, validated dataclass. The flags are derived from it."""

from dataclasses import dataclass
from typing import Literal

from megatron_dr.config import together
from megatron_dr.config.fields import choices, flag, known, must_be
from megatron_dr.config.kinds import FEASIBLE_SETS, ROW_KINDS, RowKind, set_named
from megatron_dr.projection import FeasibleSet

_GRAM_ERROR, _PRODUCT_ERROR = 0.05, 0.15  # wanted of sketches


@dataclass(frozen=True)
class DRConfig:
    """What is projected on what, per block of parameters (the problem: `projection/feasible_sets`).

    Raises:
        ValueError: a dial out of range, in one sentence that says what is allowed.
    """

    set: str = flag(
        "cone",
        "feasible set: which combinations of the rows are allowed: "
        f"{', '.join(FEASIBLE_SETS)}, or module:Class of your own",
        "name",
    )
    fraction: float = flag(
        0.25,
        "f of topk and greedy (share kept), filter (share of the opposed rows dropped) and capped "
        "(weights <= 1/fM); shares are rounded down to whole rows",
        "share, 0 < f <= 1",
    )
    ridge: float = flag(
        0.3, "rho of capped, hull, cone, span and ball, relative to tr(G)/M", "factor, >= 0"
    )
    radius: float = flag(
        0.5, "r of ball: how far from the mean row, relative to its length", "factor, >= 0"
    )
    step_length: float = flag(
        0.0,
        "e of greedy's second-order form, which maximises e sum c_i - e^2 sum G_ij over pairs of "
        "rows; 0: the mean that is nearest to the target",
        "factor, >= 0",
    )
    alpha: float = flag(
        0.05, "a: how much of the target's own gradient, (1 - a) d + a t", "share, 0 to 1"
    )
    beta: float = flag(
        0.0,
        "b: how much of the mean general gradient g is mixed into d, (1 - b) d + b g, g as long as "
        "--dr-norm makes d; 1: a plain mix of general data and target",
        "share, 0 to 1",
    )
    alpha_style: Literal["constant", "linear", "cosine", "auto"] = flag(
        "constant",
        "alpha over the run: constant, from --dr-alpha to --dr-end-alpha, or chosen at every step "
        "with beta, from the agreement of the target batch's halves and the learning rates",
        "name",
    )
    keep_general: float = flag(
        0.0,
        "with alpha style auto, least cosine of the update with the mean general gradient: alpha "
        "and beta are chosen to keep it; 0: no such floor",
        "cosine, 0 to 1",
    )
    end_alpha: float = flag(0.0, "alpha at the end of a linear or cosine style", "share, 0 to 1")
    norm: Literal["none", "general", "target", "tokens"] = flag(
        "general",
        "length of the projected gradient d, per block: |mean row|, |t|, or, with sample rows, "
        "that of the mean token loss of the weighed samples",
        "name",
    )
    rows: Literal["auto", "rank", "slot", "domain", "sample"] = flag(
        "auto",
        "a row is a data-parallel rank's gradient, one slot of its microbatches, one general "
        "corpus over all ranks, or one sample inside each layer's backward; auto: ranks where "
        "there are 8, else up to 16 slots as memory allows",
        "name",
    )
    slots: int | None = flag(
        None,
        "slots per rank, which makes the rows slots; each beyond the first keeps a gradient "
        "buffer; none: 8 with --dr-rows slot",
        "count",
    )
    memory: float = flag(
        0.1, "of the device's memory that is free at attach, what slots may take with --dr-rows "
        "auto", "share, 0 to 1",
    )  # fmt: skip
    target_ranks: int = flag(
        0,
        "data-parallel ranks that run only target microbatches, the others only general ones, so "
        "that no rank keeps a second buffer; 0: every rank runs both",
        "count",
    )
    row_ranks: int = flag(
        0,
        "neighbouring data x context ranks whose gradients are summed into one row, and that "
        "exchange among themselves what else would cross between nodes; 0: an instance of the "
        "distributed optimizer where there are several, else near to a node, where that leaves 8 "
        "rows; with --dr-rows auto the instance, too, only where that leaves 8 rows",
        "count",
    )
    slot_dtype: Literal["fp32", "bf16"] = flag("fp32", "storage of the slots' buffers", "dtype")
    blocks: Literal["model", "layer", "matrix"] = flag(
        "model", "which parameters are projected together", "name"
    )
    gram: Literal["auto", "exact", "sketch"] = flag(
        "auto",
        "inner products of whole gradients or of sketches; auto: whichever leaves less to do when "
        "the backward is over, in seconds of the links, and of memory to make sketches",
        "name",
    )
    sketch_error: float | None = flag(
        None,
        "wanted error, which sets the size: of a sketched gram relative to it, or with sample rows "
        f"of a product relative to the two lengths; none: {_GRAM_ERROR}, with sample rows "
        f"{_PRODUCT_ERROR}",
        "share, 0 < e < 1",
    )
    sketch_size: int | None = flag(
        None, "K: elements per row and block; a power of two", "elements"
    )
    score: Literal["auto", "ghost", "sketched", "exact"] = flag(
        "auto",
        "how sample rows are multiplied: token by token, by Kronecker sketches, or formed; auto: "
        "by the FLOPs of each layer",
        "name",
    )
    kronecker_out: int | None = flag(
        None, "output side of a sample's sketch; none: as --dr-sketch-error needs it", "elements"
    )
    kronecker_in: int | None = flag(
        None, "input side of a sample's sketch; none: as --dr-sketch-error needs it", "elements"
    )
    window: Literal["auto", "microbatch", "streaming", "step"] = flag(
        "auto",
        "which samples compete: of a microbatch, of all by a running threshold, or of the step; "
        "auto: of a microbatch where it has enough to choose among, else of the step",
        "name",
    )
    passes: int = flag(
        1,
        "where weights are known only at the step's end: 1 keeps the layers' inputs and output "
        "gradients, 2 runs each microbatch twice",
        "1 or 2",
    )
    target_pass: Literal["own", "merged"] = flag(
        "own", "target samples in microbatches of their own, or in each general one", "name"
    )
    target_refresh: int = flag(
        1, "steps between two target passes of their own; in between the last one is used", "steps"
    )
    targets: Literal["mean", "maximin"] = flag(
        "mean",
        "of several target sets, the target's gradient: their mean by weight, or that of all their "
        "means along which the set that gains least gains most",
        "name",
    )
    on_bad_gradient: Literal["stop", "skip", "mean"] = flag(
        "stop",
        "where a role's gradient has NaN or Inf: end the run, leave out the step, or, with rows in "
        "gradient buffers, leave out what is bad: without its target a step is the general mean",
        "name",
    )
    stall_seconds: float = flag(
        120.0, "say who is waited for where a step stands still for so long; 0: never", "seconds"
    )
    seed: int = flag(0, "seed of the sketches; each step uses seed and step", "integer")
    log_blocks: bool = flag(False, "log each block's values beside the model's", "flag")
    alpha_steps: int | None = known(None)  # the run's length in steps, where alpha changes
    target_size: int | None = known(None)  # samples of the whole target set, for auto
    target_sets: int = known(1)  # how many, for maximin
    packed: bool = known(False)  # a microbatch is one pack of samples (sample rows)
    sequences: int = known(1)  # of a sample: 2 of a preference pair (sample rows)
    domains: tuple[str, ...] = known(())  # names of the general corpora, for domain rows

    def __post_init__(self) -> None:
        self._settle_rows()
        unknown = [name for name in set_named(self.set).dials if not hasattr(self, name)]
        if unknown:
            raise ValueError(f"set {self.set!r} has dials without a flag: {', '.join(unknown)}.")
        for name, allowed in choices(DRConfig).items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}."
                )
        for name in ("alpha", "beta", "end_alpha", "keep_general", "memory"):
            share = getattr(self, name)
            must_be("in [0, 1]", 0.0 <= share <= 1.0, name, share)
        must_be("in (0, 1]", 0.0 < self.fraction <= 1.0, "fraction", self.fraction)
        for name in ("ridge", "radius", "step_length", "stall_seconds"):
            factor = getattr(self, name)
            must_be("finite and at least 0", 0.0 <= factor < float("inf"), name, factor)
        if self.slots is not None:
            must_be("at least 1", self.slots >= 1, "slots", self.slots)
        if "slots" in self.row_kind.dials and self.slots == 1:
            raise ValueError("rows='slot' with slots=1 is rows='rank': say rows='rank'.")
        for name in ("target_ranks", "row_ranks"):
            must_be("at least 0", getattr(self, name) >= 0, name, getattr(self, name))
        if self.target_ranks and not self.row_kind.target_ranks:
            raise ValueError(f"target_ranks needs rows='rank', not rows={self.rows!r}.")
        size = self.sketch_size
        if size is not None and (not 2 <= size <= 2**31 or size & (size - 1)):
            raise ValueError(f"sketch_size must be a power of two up to 2**31, not {size}.")
        must_be("in (0, 1)", 0.0 < self.wanted_error < 1.0, "sketch_error", self.sketch_error)
        steps = self.alpha_steps
        if self.alpha_style != "constant" and steps is not None and steps < 1:
            raise ValueError(f"alpha_steps must be at least 1, not {self.alpha_steps}.")
        if self.targets == "maximin":
            together.check_maximin(self)
        if self.row_kind.in_layers:
            together.check_samples(self)
        elif self.norm == "tokens":
            raise ValueError(f"norm='tokens' needs rows='sample', not rows={self.rows!r}.")
        if len(set(self.domains)) != len(self.domains):
            raise ValueError(f"domains must have different names, not {', '.join(self.domains)}.")

    def _settle_rows(self) -> None:
        """Dials that only one kind of rows has choose it."""
        if self.rows == "auto" and self.slots is not None:
            object.__setattr__(self, "rows", "slot")
        elif self.rows == "auto" and self.target_ranks:
            object.__setattr__(self, "rows", "rank")
        if self.rows == "slot" and self.slots is None:
            object.__setattr__(self, "slots", 8)

    def feasible_set(self) -> FeasibleSet:
        """The set as an object, with its dials."""
        own = set_named(self.set)
        return own(**{name: getattr(self, name) for name in own.dials})

    @property
    def wanted_error(self) -> float:
        """Of sketches."""
        default = _PRODUCT_ERROR if self.row_kind.in_layers else _GRAM_ERROR
        return default if self.sketch_error is None else self.sketch_error

    @property
    def row_kind(self) -> RowKind:
        """What the rows are."""
        return ROW_KINDS[self.rows]

    @property
    def can_choose_alpha(self) -> bool:
        """Whether alpha may be known as late as at a step's end: sample rows take most of the
        target's gradient in before that."""
        late = self.passes == 2 or self.target_pass == "merged"
        return not self.row_kind.in_layers or (late and self.window in ("auto", "step"))

    @property
    def merges_target(self) -> bool:
        """Whether target samples are in the general microbatches."""
        return self.row_kind.in_layers and self.target_pass == "merged"

    def unread(self) -> dict[str, str]:
        """Dials that some sets or rows read, but not these: {dial: `set` or `rows`}."""
        of_sets = {name for each in FEASIBLE_SETS.values() for name in each.dials}
        of_rows = {name for each in ROW_KINDS.values() for name in each.dials}
        return {
            **dict.fromkeys(of_sets.difference(set_named(self.set).dials), "set"),
            **dict.fromkeys(of_rows.difference(self.row_kind.dials), "rows"),
        }

    @property
    def num_slots(self) -> int:
        """General buffers per rank: slots, or domains; 1 for the sets that weigh no rows."""
        return self.row_kind.num_slots(self) if self.weighs_rows or self.row_kind.named else 1

    @property
    def weighs_rows(self) -> bool:
        """Whether the set tells rows apart."""
        return set_named(self.set).weighs_rows

    @property
    def needs_target(self) -> bool:
        """Whether a step without a target batch makes no sense."""
        return set_named(self.set).reads_target or self.alpha_style != "constant"
