"""The plan's numbers as tables on a terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dr.plan.flops import said
from megatron_dr.plan.report import flags_of
from megatron_dr.plan.sweep import Proposal

GB = 1e9
_SHOWN = 10  # proposals
_STAGES = 8  # columns


def show(numbers: dict[str, Any], console: Console) -> None:
    """All of a run's report."""
    console.print(heading(numbers), highlight=False, soft_wrap=True)
    console.print(_memory(numbers))
    console.print(_sent(numbers))
    console.print(_seconds(numbers))
    for sentence in (*sentences(numbers), *numbers["chosen"], numbers["refusal"]):
        if sentence:
            console.print(sentence, highlight=False, soft_wrap=True)


def heading(numbers: dict[str, Any]) -> str:
    """Sizes of the layout and of the batch."""
    layout, batch = numbers["layout"], numbers["batch"]
    sizes = ", ".join(f"{n.upper()} {layout[n]}" for n in ("tp", "pp", "vpp", "cp", "ep", "dp")
                      if layout[n] > 1) or "one rank"  # fmt: skip
    return (
        f"{layout['gpus']} GPUs ({sizes}): {batch['general_microbatches']} general and "
        f"{batch['target_microbatches']} target microbatches of {batch['micro_batch']} x "
        f"{batch['length']} tokens a step and rank that runs them"
    )


def _table(title: str, first: str, *columns: str) -> Table:
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    out.add_column(first, no_wrap=True)
    for column in columns:
        out.add_column(column, justify="right")
    return out


def shown_stages(numbers: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Headings and numbers of the stages that a table shows."""
    stages = numbers["memory"]["stages"]
    shown = list(range(len(stages)))
    if len(stages) > _STAGES:  # the ends, and the one that needs most
        totals = [sum(parts.values()) for parts in stages]
        shown = sorted({0, totals.index(max(totals)), len(stages) - 1})
    return [f"stage {n}" for n in shown] if len(stages) > 1 else ["a rank"], shown


def _memory(numbers: dict[str, Any]) -> Table:
    heads, shown = shown_stages(numbers)
    stages = numbers["memory"]["stages"]
    out = _table("Memory, GB", "part", *heads)
    for part in stages[0]:
        out.add_row(part, *(f"{stages[n][part] / GB:.2f}" for n in shown))
    out.add_section()
    out.add_row("all", *(f"{sum(stages[n].values()) / GB:.2f}" for n in shown))
    out.add_row("of", *[f"{numbers['memory']['usable'] / GB:.2f}"] * len(shown))
    return out


def _sent(numbers: dict[str, Any]) -> Table:
    out = _table("Sent by a rank in a step, GB", "gradients and parameters", "plain", "ours")
    plain, ours = numbers["sent"]["plain"], numbers["sent"]["ours"]
    for level in plain:
        out.add_row(level, f"{plain[level] / GB:.2f}", f"{ours[level] / GB:.2f}")
    return out


def _seconds(numbers: dict[str, Any]) -> Table:
    out = _table("Seconds of a step", "part", "plain", "ours")
    *parts, whole = seconds_of(numbers)
    for row in parts:
        out.add_row(*row)
    out.add_section()
    out.add_row(*whole)
    return out


def seconds_of(numbers: dict[str, Any]) -> list[list[str]]:
    """Rows of parts, and of all."""
    plain, ours = numbers["seconds"]["plain"], numbers["seconds"]["ours"]
    out = []
    for part in dict.fromkeys([*plain, *ours]):
        values = [parts.get(part, 0.0) for parts in (plain, ours)]
        if any(values):
            out.append([part, *(f"{value:.4f}" for value in values)])
    return [*out, ["all", *(f"{sum(parts.values()):.4f}" for parts in (plain, ours))]]


def sentences(numbers: dict[str, Any]) -> Sequence[str]:
    """Of operations, and of the largest microbatch."""
    parts = {name: size for name, size in numbers["operations"].items() if size}
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {said(size)}" for name, size in parts.items())
    largest = numbers["largest_micro_batch"]
    return (
        f"A step computes {said(whole)} ({shares}).",
        f"The largest microbatch that divides the batches and fits: {largest or 'none'}.",
    )


def proposals(found: list[Proposal], console: Console) -> None:
    """The first of a sweep."""
    if not found:
        console.print("No layout of these GPUs fits.")
        return
    out = _table(f"{len(found)} layouts fit; the fastest", "flags", "rows", "s a step", "GB a rank")
    for one in found[:_SHOWN]:
        rows = one.run.rows
        number = str(rows.of(one.run.layout).rows) if rows is not None else "-"
        out.add_row(flags_of(one.run), number, f"{one.seconds:.3f}", f"{one.memory / GB:.1f}")
    out.columns[0].no_wrap = False
    console.print(out)
