"""Writes the tables of plan.md: what each design costs, from 8 GPUs to 16,384.

python docs/plan.py
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_dr.plan import fit, step
from megatron_dr.plan.activations import Kept, Shape
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows, ranks_near_a_node
from megatron_dr.plan.step import Run

PAGE = Path(__file__).with_name("plan.md")
GENERAL, TARGET = 7, 1  # microbatches of a rank
MODELS = {  # sizes and layouts as in scale.py
    "Llama-3.1 8B, TP 2": (Model(32, 4096, 32, 8, 14336, 128256), 2, 1),
    "Llama-3.1 70B, TP 8, PP 4": (Model(80, 8192, 64, 8, 28672, 128256), 8, 4),
}
GPUS = (8, 64, 256, 1024, 4096, 16384)


def designs(layout: Layout) -> dict[str, Rows | None]:
    """By what --dr-* flags say; None: not in this layout."""
    ranks = ranks_near_a_node(layout, H100.node)
    eighth = layout.dp // 8 if layout.dp % 8 == 0 and layout.dp // 8 % ranks == 0 else 0
    return {
        "rows of one rank": Rows(halves=True),
        "rows near a node, at most 128 (default)": Rows(ranks=ranks, halves=True),
        "7 slots of each": Rows(ranks=ranks, slots=7, halves=True),
        "sketches": Rows(ranks=ranks, exact=False, halves=True),
        "an eighth of the ranks for the target": (
            Rows(ranks=ranks, target_ranks=eighth, halves=True) if eighth else None
        ),
    }


def tables() -> str:
    """The part of the page that is made."""
    return "\n\n".join("\n".join(_table(name)) for name in MODELS)


def _table(name: str) -> Iterator[str]:
    model, tp, pp = MODELS[name]
    counts = [gpus for gpus in GPUS if gpus >= 2 * tp * pp]
    found: dict[str, list[str]] = {}
    for gpus in counts:
        layout = Layout(dp=gpus // tp // pp, tp=tp, pp=pp, sequence_parallel=True)
        for design, rows in designs(layout).items():
            found.setdefault(design, []).append(_cell(model, layout, rows))
    yield f"| {name} | {' | '.join(f'{gpus:,} GPUs' for gpus in counts)} |"
    yield f"| --- | {' | '.join(['---:'] * len(counts))} |"
    for design, cells in found.items():
        yield f"| {design} | {' | '.join(cells)} |"


def _cell(model: Model, layout: Layout, rows: Rows | None) -> str:
    """Seconds more than plain Megatron's step of as many microbatches; GB; rows."""
    if rows is None:
        return "-"
    plain = Run(model, layout, Kept(Shape(1, 8192)), GENERAL + TARGET)
    whole = GENERAL + TARGET
    numbers = (whole, whole) if rows.target_ranks else (GENERAL, TARGET)
    ours = dataclasses.replace(plain, general=numbers[0], target=numbers[1], rows=rows)
    memory, number = fit.most(ours), rows.of(layout).rows
    if memory > H100.usable:
        return f"{number} rows: {memory / 1e9:.0f} GB"
    seconds = [sum(step.seconds(run, H100).values()) for run in (plain, ours)]
    return f"{number} rows: {100 * (seconds[1] / seconds[0] - 1):.1f}%, {memory / 1e9:.0f} GB"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(
        r"(<!-- made by docs/plan.py -->\n).*(<!-- end -->)",
        lambda m: f"{m[1]}\n{tables()}\n\n{m[2]}", text, flags=re.S,
    )  # fmt: skip
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
