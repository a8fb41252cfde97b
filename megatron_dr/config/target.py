"""Where the target's data come from, and what is looked at beside training."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be

# fields with which alone nothing is projected: the run is only watched
WATCHING = frozenset({
    "metrics", "target_valid_data", "target_test_data", "keep_best", "generate",
    "generate_metrics", "generate_tokens", "record", "record_every", "record_rows",
})  # fmt: skip


@dataclass(frozen=True)
class TargetConfig:
    """Where the target role's data comes from (flags of the training entry)."""

    target_data: str | None = flag(
        None, "target set: a file or folder of samples, or the prefix of an indexed dataset", "path"
    )
    target_batch_size: int = flag(8, "target sequences per step, over all data ranks", "sequences")
    target_valid_data: str | None = flag(
        None, "held-out target set, evaluated with Megatron's validation", "path"
    )
    target_test_data: str | None = flag(
        None, "target set that is evaluated once, at the end of the run", "path"
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
        for name in ("target_batch_size", "generate_tokens", "record_every", "record_rows"):
            must_be("at least 1", getattr(self, name) >= 1, name, getattr(self, name))
