"""What is said of a case: each family's best by validation, auto beside the best, and the bars."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from cases import Case
from families import FAMILIES
from store import BEFORE, Row

from megatron_dr.compare import figures
from megatron_dr.compare.figures import Difference

# The bars, as the README has them.
TARGET, GENERAL, ERRORS = 2.0, 0.02, 2.0  # percent; nats per byte; standard errors

AUTO, MIX = "auto", "mix"
Point = tuple[float, float]  # target loss, general loss


@dataclass(frozen=True)
class Measured:
    """An arm's losses, a value for each seed."""

    family: str
    dial: str
    valid: list[float]
    target: list[float]
    general: list[float]

    @property
    def point(self) -> Point:
        return statistics.mean(self.target), statistics.mean(self.general)

    @property
    def name(self) -> str:
        return f"{self.family} {self.dial}".strip()

    @property
    def is_last(self) -> bool:
        """Whether the dial is its grid's last: a better one may lie beyond."""
        arms = FAMILIES.get(self.family, [])
        return any(arm.is_last for arm in arms if arm.dial == self.dial)


@dataclass(frozen=True)
class Found:
    """Of a case.

    Attributes:
        seeds: those that every arm of it has.
        arms: all that ran.
        best: family -> its best arm by validation.
        before: the losses of what they begin from; None where it was not measured.
    """

    case: Case
    seeds: list[int]
    arms: list[Measured]
    best: dict[str, Measured]
    before: Point | None


@dataclass(frozen=True)
class Verdict:
    """`auto` beside others, on the test.

    Attributes:
        first, mix: the best arm of all others and the best mix, by validation.
        from_first, from_mix: target loss of auto less theirs, paired over seeds, in percent of
            theirs.
        above: general loss of auto above the mixes' at equal target loss.
        beyond: whether no mix has so low a target loss: then `above` is from the mix that comes
            nearest to it.
        bars: name -> whether it is met; None where it does not apply, or can't be told.
    """

    first: Measured
    mix: Measured
    from_first: Difference
    from_mix: Difference
    above: Difference
    beyond: bool
    bars: dict[str, bool | None]


def gather(case: Case, rows: Sequence[Row]) -> Found | None:
    """Of the rows of a case; None without any, or where no seed has all of its arms."""
    own = [row for row in rows if row.case == case.name]
    before = [(row.target_test, row.general_test) for row in own if row.family == BEFORE]
    arms: dict[tuple[str, str], dict[int, Row]] = {}
    for family, dials in FAMILIES.items():
        for arm in dials:
            of_seeds = {
                row.seed: row for row in own if (row.family, row.dial) == (family, arm.dial)
            }
            if of_seeds:
                arms[family, arm.dial] = of_seeds
    seeds = sorted(set.intersection(*map(set, arms.values()))) if arms else []
    if not seeds:
        return None
    measured = [_measured(key, [found[seed] for seed in seeds]) for key, found in arms.items()]
    best = {arm.family: chosen([other for other in measured if other.family == arm.family])
            for arm in measured}  # fmt: skip
    return Found(case, seeds, measured, best, before[0] if before else None)


def _measured(key: tuple[str, str], rows: Sequence[Row]) -> Measured:
    return Measured(*key, [row.target_valid for row in rows], [row.target_test for row in rows],
                    [row.general_test for row in rows])  # fmt: skip


def chosen(arms: Sequence[Measured]) -> Measured:
    """The one whose mean target validation loss is lowest."""
    return min(arms, key=lambda arm: statistics.mean(arm.valid))


def frontier(points: Sequence[Point]) -> list[int]:
    """Numbers of the points that no other is below in both losses, by rising target loss."""
    kept: list[int] = []
    for number in sorted(range(len(points)), key=lambda number: points[number]):
        if not kept or points[number][1] < points[kept[-1]][1]:
            kept.append(number)
    return kept


def shares(points: Sequence[Point], at: float) -> list[float]:
    """Of each point in the place of their frontier where the target loss is `at`: of the two that
    lie beside it, or 1 of the end that is nearest. Their sum is 1."""
    kept = frontier(points)
    ticks = [points[number][0] for number in kept]
    found = [0.0] * len(points)
    for place, number in enumerate(kept):
        found[number] = float(np.interp(at, ticks, np.eye(len(kept))[place]))
    return found


def verdict(found: Found) -> Verdict | None:
    """None where `auto`, the mixes or anything else did not run."""
    if AUTO not in found.best or MIX not in found.best:
        return None
    auto, mix = found.best[AUTO], found.best[MIX]
    first = chosen([arm for arm in found.arms if arm.family != AUTO])
    from_first, from_mix = (percent(auto, other) for other in (first, mix))
    above, beyond = _above(auto, [arm for arm in found.arms if arm.family in (MIX, "general")])
    beats = None
    if found.case.is_hard and from_mix.se is not None:
        beats = figures.in_errors(from_mix) <= -ERRORS
    bars = {"target": from_first.mean <= TARGET, "general": above.mean <= GENERAL, "mix": beats}
    return Verdict(first, mix, from_first, from_mix, above, beyond, bars)


def percent(arm: Measured, other: Measured) -> Difference:
    """Target loss of an arm less another's, in percent of the other's mean."""
    gap, whole = figures.paired(arm.target, other.target), statistics.mean(other.target) / 100
    return Difference(gap.mean / whole, None if gap.se is None else gap.se / whole)


def _above(auto: Measured, mixes: Sequence[Measured]) -> tuple[Difference, bool]:
    """(general loss above the mixes' frontier, whether auto lies beyond its end).

    The place on the frontier is that of the means over seeds, so that no seed chooses for itself.
    """
    points = [arm.point for arm in mixes]
    at = auto.point[0]
    parts = shares(points, at)
    of_seeds = [sum(part * arm.general[seed] for part, arm in zip(parts, mixes, strict=True))
                for seed in range(len(auto.general))]  # fmt: skip
    return figures.paired(auto.general, of_seeds), at < min(point[0] for point in points)
