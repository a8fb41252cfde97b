"""Direct preference optimisation's configuration: the loss on pairs of answers."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be

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
        beta, share = self.beta, self.label_smoothing
        must_be("finite and above 0", 0.0 < beta < float("inf"), "--dr-dpo-beta", beta)
        must_be("in [0, 0.5)", 0.0 <= share < 0.5, "--dr-dpo-label-smoothing", share)
