"""What is compared, as text: general, target, mix:0.1, topk:0.5, cone:0.05, auto."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import FEASIBLE_SETS

FORMS = f"general, target, mix:ALPHA, auto, or SET[:ALPHA], SET one of {', '.join(FEASIBLE_SETS)}"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        flags: of `megatron_dr.train`; the target's data not among them.
        uses_target: whether it ever sees the target.
        weighs_rows: whether it tells general rows apart, which takes time.
    """

    name: str
    flags: str
    uses_target: bool
    weighs_rows: bool

    @property
    def is_mix(self) -> bool:
        """Whether it is a plain mix of both roles."""
        return self.name.startswith("mix:")


def parse(text: str) -> list[Arm]:
    """The arms of a list with commas.

    Raises:
        ValueError: one that there is not, one given twice, or a share out of range.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--arms is empty: give {FORMS}.")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--arms has {twice} twice: name it once.")
    return [_arm(name) for name in names]


def _arm(name: str) -> Arm:
    if name == "general":
        return Arm(name, "--dr-set mean", False, False)
    if name == "auto":
        return Arm(name, "--dr-set cone --dr-alpha-style auto", True, True)
    kind, number = _split(name)
    if kind == "mix" and number is None:
        raise ValueError(f"--arms {name}: give the target's share, as in mix:0.1.")
    kind = {"mix": "mean"}.get(kind, kind)
    dial = "fraction" if kind == "topk" else "alpha"
    try:
        dr = DRConfig(set=kind, **({} if number is None else {dial: number}))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"--arms {name}: {error} An arm is {FORMS}.") from None
    takes_alpha = dr.feasible_set().alpha is None
    if not takes_alpha and number is not None:
        raise ValueError(f"--arms {name}: {kind} takes no share: give {kind} alone.")
    dials = "" if number is None else f" --dr-{dial} {number:g}"
    if takes_alpha and "alpha" not in dials:
        dials += f" --dr-alpha {dr.alpha:g}"  # of none, `auto` chooses it
    return Arm(name, f"--dr-set {kind}{dials}", True, dr.weighs_rows)


def _split(name: str) -> tuple[str, float | None]:
    """A set's name, which may have a colon itself, and the number after it."""
    kind, _, tail = name.rpartition(":")
    try:
        return (kind, float(tail)) if kind else (name, None)
    except ValueError:
        return name, None


def baseline(arms: Sequence[Arm], best_mix: str | None) -> str:
    """What the others are measured against: the best mix, else `general`, else the first arm."""
    names = [arm.name for arm in arms]
    return best_mix or ("general" if "general" in names else names[0])
