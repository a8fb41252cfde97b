"""Where the target's data come from, and what is looked at beside training."""

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be
from megatron_dr.config.target_sets import Named, TargetSet, by_name, check_known, check_names

# fields with which alone nothing is projected: the run is only watched
WATCHING = frozenset({
    "metrics", "target_valid_data", "target_test_data", "keep_best", "generate",
    "generate_metrics", "generate_tokens", "record", "record_every", "record_rows",
})  # fmt: skip


# fields that may have several values, each with a name
NAMED: dict[str, type] = {
    "target_data": str, "target_batch_size": int, "target_weights": float,
    "target_valid_data": str, "target_test_data": str,
}  # fmt: skip


@dataclass(frozen=True)
class TargetConfig:
    """Where the target role's data comes from (flags of the training entry)."""

    target_data: Named[str] | None = flag(
        None,
        "target set: a file or folder of samples, or the prefix of an indexed dataset; several as "
        "NAME=PATH NAME=PATH ...",
        "path",
    )
    target_batch_size: Named[int] = flag(
        8,
        "target sequences per step, over all data ranks; with several sets of each one, or "
        "NAME=NUMBER of those that have another",
        "sequences",
    )
    target_weights: Named[float] | None = flag(
        None,
        "of several target sets, NAME=WEIGHT of those whose weight is not 1: the target's gradient "
        "is the sets' mean with these weights",
        "weight",
    )
    target_valid_data: Named[str] | None = flag(
        None,
        "held-out target set, evaluated with Megatron's validation; several as NAME=PATH ...",
        "path",
    )
    target_test_data: Named[str] | None = flag(
        None,
        "target set that is evaluated once, at the end of the run; several as NAME=PATH ...",
        "path",
    )
    keep_best: bool = flag(
        False, "keep the checkpoint that is best on the held-out target in SAVE/best", "flag"
    )
    metrics: str | None = flag(
        None, "write one JSON line per training step and validation to this file", "path"
    )
    record: str | None = flag(
        None, "write each row's weight and score, with the samples' identity, to this folder",
        "folder",
    )  # fmt: skip
    record_every: int = flag(10, "of so many steps one is recorded", "steps")
    record_rows: int = flag(
        32, "of a block in a step, so many rows of the largest and of the least weight", "rows"
    )
    generate: str | None = flag(
        None,
        "samples whose prompts the model answers at the end of the run, or with --skip-train once",
        "path",
    )
    generate_metrics: str = flag(
        "exact,f1",
        "what the answers are scored by, with commas: exact, f1, rouge_l, or rewards as "
        "module:function",
        "names",
    )
    generate_tokens: int = flag(128, "length of an answer, at most", "tokens")

    def __post_init__(self) -> None:
        for name in ("generate_tokens", "record_every", "record_rows"):
            must_be("at least 1", getattr(self, name) >= 1, name, getattr(self, name))
        for batch in by_name(self.target_batch_size).values():
            must_be("at least 1", batch >= 1, "target_batch_size", batch)
        for weight in by_name(self.target_weights).values():
            above = 0.0 < weight < float("inf")
            must_be("finite and above 0", above, "target_weights", weight)
        self._check_sets()

    def _check_sets(self) -> None:
        """What has names, has them alike."""
        of, known = "--dr-target-data", self.target_data
        for name in NAMED:
            flag, value = "--dr-" + name.replace("_", "-"), getattr(self, name)
            check_names(flag, value)
            held_out = name in ("target_valid_data", "target_test_data")
            if not held_out or isinstance(known, tuple):  # else its names are its own
                check_known(flag, value, of, known)
        if self.target_weights is not None and not isinstance(self.target_weights, tuple):
            raise ValueError(
                f"--dr-target-weights {self.target_weights}: a weight is of a set of {of}: give "
                "NAME=WEIGHT."
            )

    @property
    def target_sets(self) -> tuple[TargetSet, ...]:
        """Those of a step, in their order; of a run whose target is made as it goes, one."""
        paths: dict[str, str | None] = {**by_name(self.target_data)} or {"": None}
        batches, weights = by_name(self.target_batch_size), by_name(self.target_weights)
        whole = sum(weights.get(name, 1.0) for name in paths)
        return tuple(
            TargetSet(
                name, path, weights.get(name, 1.0) / whole,
                batches.get(name, batches.get("", TargetConfig.target_batch_size)),  # type: ignore[arg-type]
            )
            for name, path in paths.items()
        )  # fmt: skip

    @property
    def target_batch(self) -> int:
        """Target sequences of a step, over all data ranks and of all sets."""
        return sum(one.batch for one in self.target_sets)

    def weights_of(self, names: Iterable[str]) -> dict[str, float]:
        """Weights of held-out sets, which sum to 1: those of the target sets of their names, or,
        where these have none, alike."""
        known = {one.name: one.weight for one in self.target_sets}
        found = {name: known.get(name, 1.0) for name in names}
        return {name: weight / sum(found.values()) for name, weight in found.items()}
