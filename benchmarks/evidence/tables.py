"""The tables: of each case its families, of all of them how `auto` stands, and what it misses."""

from collections.abc import Sequence
from pathlib import Path

import measures
from measures import AUTO, Found, Measured, Verdict
from rich.console import Console

from megatron_dr.compare import figures
from megatron_dr.compare.figures import Difference

UNIT = "nats per byte"
EDGE = " †"  # on a dial that is the last of its grid
BEYOND = " ‡"  # where no mix has so low a target loss


def families(found: Found, path: Path, console: Console) -> None:
    """A row for each family's best dial by validation."""
    auto = found.best.get(AUTO)
    rows = []
    if found.before is not None:
        rows.append(["before", "", "", *(f"{loss:.3f}" for loss in found.before), "", ""])
    for family, arm in found.best.items():
        gap = None if auto is None or arm is auto else measures.percent(auto, arm)
        rows.append([family, _dial(arm), *map(_loss, (arm.valid, arm.target, arm.general)),
                     *_difference(gap)])  # fmt: skip
    header = ["family", "dial", "target validation", "target test", "general test",
              "auto from it, %", "in se"]  # fmt: skip
    title = f"{found.case.name}: {found.case.title}. Loss in {UNIT}, {_seeds(found)}"
    caption = ("dial: by target validation; auto from it: target test loss, paired over seeds, "
               f"below 0 is for auto;{EDGE} the grid's last dial")  # fmt: skip
    figures.table(title, header, rows, path, console, caption, bold=AUTO)


def verdicts(all_found: Sequence[Found], path: Path, console: Console) -> None:
    """A row for each case, and a sentence on each bar that is missed."""
    rows, missed = [], []
    for found in all_found:
        verdict = measures.verdict(found)
        if verdict is None:
            continue
        rows.append([
            found.case.name, str(len(found.seeds)), verdict.first.name + _edge(verdict.first),
            *_difference(verdict.from_first), _mark(verdict.bars["target"]),
            verdict.mix.dial + _edge(verdict.mix), *_difference(verdict.from_mix),
            _mark(verdict.bars["mix"]), _above(verdict), _mark(verdict.bars["general"]),
        ])  # fmt: skip
        missed += [f"{found.case.name}: {text}" for text in misses(verdict)]
    header = ["case", "seeds", "best other arm", "auto from it, %", "in se", "bar", "best mix",
              "auto from it, %", "in se", "bar", "general above the mixes", "bar"]  # fmt: skip
    title = (f"auto, without tuning, beside the best of the other arms and the best mix, both by "
             f"validation. Target test loss in percent, general test loss in {UNIT}, mean ± "
             "standard error over seeds, paired")  # fmt: skip
    text = "Missed: " + ("; ".join(missed) if missed else "nothing that was measured") + "."
    figures.table(title, header, rows, path, console, bold="")
    console.print(text, soft_wrap=True, markup=False, highlight=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\nBars: target at most {measures.TARGET:g}% above the best other arm; general "
                   f"at most {measures.GENERAL:g} above the mixes at equal target loss ("
                   f"{BEYOND.strip()}: no mix has so low a target loss, and the one that comes "
                   "nearest is taken); where up "
                   f"to 16 targets have more of their kind hidden in the pool, {measures.ERRORS:g} "
                   f"standard errors below the best mix.{EDGE}: the grid's last dial, a better one "
                   f"may lie beyond.\n\n{text}\n")  # fmt: skip


def misses(verdict: Verdict) -> list[str]:
    """The bars that are missed, in words."""
    said = {
        "target": f"target {_signed(verdict.from_first)}% from {verdict.first.name}",
        "general": f"general {_signed(verdict.above, 3)} above the mixes",
        "mix": f"{_signed(verdict.from_mix)}% from the best mix, "
               f"{figures.in_errors(verdict.from_mix):+.1f} standard errors",
    }  # fmt: skip
    return [text for name, text in said.items() if verdict.bars[name] is False]


def _seeds(found: Found) -> str:
    return f"mean ± standard error of {len(found.seeds)} seed(s)"


def _loss(values: Sequence[float]) -> str:
    return figures.with_error(figures.summary(values))


def _dial(arm: Measured) -> str:
    return arm.dial + _edge(arm)


def _edge(arm: Measured) -> str:
    return EDGE if arm.is_last else ""


def _signed(difference: Difference, digits: int = 1) -> str:
    error = "" if difference.se is None else f" ± {difference.se:.{digits}f}"
    return f"{difference.mean:+.{digits}f}{error}"


def _difference(difference: Difference | None) -> list[str]:
    """(itself, in standard errors)."""
    if difference is None:
        return ["", ""]
    errors = "" if difference.se is None else f"{figures.in_errors(difference):+.1f}"
    return [_signed(difference), errors]


def _above(verdict: Verdict) -> str:
    return _signed(verdict.above, 3) + BEYOND * verdict.beyond


def _mark(is_met: bool | None) -> str:
    return {True: "met", False: "MISSED", None: ""}[is_met]
