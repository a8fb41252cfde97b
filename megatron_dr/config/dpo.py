"""Direct preference optimisation's configuration: the loss on pairs of answers."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag

SEQUENCES = 2  # of a pair


@dataclass(frozen=True)
class PreferenceConfig:
    """DPO (arXiv 2305.18290) with data regularisation; flags `--dr-dpo-*`.

    The loss is `megatron_dr.rl.preference.dpo_loss`.

    Raises:
        ValueError: a dial out of range, in one sentence that says what is allowed.
    """

    beta: float = flag(
        0.1, "train on preference pairs by DPO: the weight of a pair's margin; switches it on",
        "factor, > 0",
    )  # fmt: skip
    label_smoothing: float = flag(
        0.0, "chance that a pair's two answers are exchanged", "share, 0 <= s < 0.5"
    )

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < float("inf"):
            raise ValueError(f"--dr-dpo-beta must be finite and above 0, not {self.beta}.")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"--dr-dpo-label-smoothing must be in [0, 0.5), not {self.label_smoothing}."
            )
