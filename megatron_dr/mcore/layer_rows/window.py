"""Which samples compete: `--dr-window auto` settled, and windows with too few of them refused."""

import dataclasses
import math

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.mcore.layer_rows.weigh import needs_rows

_MICRO, _GLOBAL = "--micro-batch-size", "--global-batch-size"


def settled(dr: DRConfig) -> tuple[DRConfig, str]:
    """The configuration with the window that this run has, and a sentence that says why, or none.

    Where the sizes of a step are not known here, or a microbatch is a pack, whose samples are only
    counted when it is read, `auto` is the microbatch and nothing is refused.

    Raises:
        ValueError: the set has nothing to choose among in the window.
    """
    if not dr.row_kind.in_layers:
        return dr, ""
    sizes, why = None if dr.packed else compat.samples_of_a_step(), ""
    if dr.window == "auto":
        window, why = _chosen(dr, sizes)
        dr = dataclasses.replace(dr, window=window)  # type: ignore[arg-type]
    if sizes is not None:
        _check(dr, sizes)
    return dr, why


def _chosen(dr: DRConfig, sizes: tuple[int, int] | None) -> tuple[str, str]:
    """The smallest window in which there is something to choose; why, if not the microbatch."""
    if dr.alpha_style == "auto" and dr.can_choose_alpha:
        return "step", ""
    if sizes is None or not dr.weighs_rows:
        return "microbatch", ""
    enough, (micro, step) = max(2, _least(dr)), sizes
    no_step = (dr.score == "ghost" and needs_rows(dr)) or not experts.are_near()
    if micro >= enough or step == micro or no_step:
        return "microbatch", ""
    return "step", (
        f"window auto: the {step} samples of a step compete; with {_MICRO} {micro} a microbatch "
        f"has fewer than the {enough} that {_named(dr)} chooses among"
    )


def _check(dr: DRConfig, sizes: tuple[int, int]) -> None:
    (flag, count), least = (
        [(_MICRO, sizes[0]), (_GLOBAL, sizes[1])][dr.window == "step"],
        _least(dr),
    )
    if count >= least:
        return
    other = "" if dr.window == "step" else ", or use --dr-window step"
    raise ValueError(
        f"{_named(dr)} chooses among {least} samples or more, but in --dr-window {dr.window} "
        f"{count} compete{'s'[: count == 1]} ({flag} {count}), so that its choice would mean "
        f"nothing: raise {flag}{other}."
    )


def note(dr: DRConfig, count: int) -> str:
    """What is said of windows of so many samples, where they are too few; empty: nothing.

    Args:
        count: samples of a microbatch.
    """
    if dr.packed or dr.window == "step" or not dr.weighs_rows:
        return ""
    if count < _least(dr):
        return (
            f"note: {_named(dr)} chooses among {_least(dr)} samples or more, and a microbatch has "
            f"{count}"
        )
    alone = dr.feasible_set().one_row if count == 1 else ""
    return f"note: one sample in a microbatch: {alone}" if alone else ""


def _least(dr: DRConfig) -> int:
    return math.ceil(dr.feasible_set().least_rows - 1e-9)


def _named(dr: DRConfig) -> str:
    share = f" with --dr-fraction {dr.fraction}" if "fraction" in dr.feasible_set().dials else ""
    return f"--dr-set {dr.set}{share}"
