"""The arms: families of ways to train, each with the five dials that are tried, or with none."""

from dataclasses import dataclass

STEPS = 50  # of a run, both stages of `sequential` together


@dataclass(frozen=True)
class Arm:
    """One family at one dial.

    Attributes:
        flags: of `megatron_dr.train`, beside those that all runs have.
        steps: fewer: it is stopped there, on the learning rates of the whole run.
        is_last: whether the dial is the last of a grid, beyond which a better one may lie.
        is_second: whether it goes on from half a run on the general data.
    """

    family: str
    dial: str
    flags: str
    steps: int = STEPS
    is_last: bool = False
    is_second: bool = False
    uses_target: bool = True

    @property
    def name(self) -> str:
        return f"{self.family} {self.dial}".strip()


SHARES = (0.0, 0.05, 0.1, 0.3, 0.5)
MIXES = (0.05, 0.1, 0.2, 0.3, 0.5)
# learning rate of the target alone, step at which it is stopped
STOPS = (("2e-3", 10), ("2e-3", 20), ("5e-4", 20), ("5e-4", 35), ("5e-4", 50))
RATES = ("1e-4", "2.5e-4", "5e-4", "1e-3", "2e-3")  # of the second half of `sequential`
TOPK = (("layer", 0.5, 0.0), ("layer", 0.5, 0.05), ("layer", 0.5, 0.3), ("layer", 0.25, 0.05),
        ("model", 0.5, 0.05))  # fmt: skip
SAMPLES = ((0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (0.5, 0.1), (0.5, 0.3))
# the single pass of the authors' experiments: docs/layer-path.md. Samples of a microbatch compete.
AUTHORS = ("--micro-batch-size 8 --dr-rows sample --dr-blocks matrix --dr-set topk "
           "--dr-norm tokens")  # fmt: skip


def _grid(family: str, flags: str, shares: tuple[float, ...]) -> list[Arm]:
    """Arms that differ in alpha alone."""
    return [Arm(family, f"{share:g}", f"{flags} --dr-alpha {share:g}", is_last=share == shares[-1])
            for share in shares]  # fmt: skip


FAMILIES: dict[str, list[Arm]] = {
    "general": [Arm("general", "", "--dr-set mean", uses_target=False)],
    "target": [
        Arm("target", f"{rate}, {steps} steps", f"--dr-set target --lr {rate}", steps)
        for rate, steps in STOPS
    ],
    "sequential": [
        Arm("sequential", rate, f"--dr-set target --lr {rate}", STEPS // 2,
            is_last=rate == RATES[-1], is_second=True)
        for rate in RATES
    ],
    "mix": _grid("mix", "--dr-set mean", MIXES),
    "topk": [
        Arm("topk", f"{blocks}, f {share:g}, α {alpha:g}",
            f"--dr-set topk --dr-blocks {blocks} --dr-fraction {share:g} --dr-alpha {alpha:g}")
        for blocks, share, alpha in TOPK
    ],
    "filter": _grid("filter", "--dr-set filter --dr-fraction 1", SHARES),
    "samples": [
        Arm("samples", f"f {share:g}, α {alpha:g}",
            f"{AUTHORS} --dr-fraction {share:g} --dr-alpha {alpha:g}")
        for share, alpha in SAMPLES
    ],
    "cone": _grid("cone", "--dr-set cone", SHARES),
    "auto": [Arm("auto", "", "--dr-set cone --dr-alpha-style auto")],
}  # fmt: skip

# what `sequential` begins with; it is no arm of its own
FIRST_HALF = Arm("first half", "", "--dr-set mean", STEPS // 2, uses_target=False)
