"""Where the target's data come from, and what is looked at beside training."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be

# fields with which alone nothing is projected: the run is only watched
WATCHING = frozenset({"metrics", "target_valid_data", "target_test_data", "keep_best"})


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

    def __post_init__(self) -> None:
        size = self.target_batch_size
        must_be("at least 1", size >= 1, "target_batch_size", size)
