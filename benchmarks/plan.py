"""The plan's bytes and memory beside those of real runs on 1 to 8 gloo ranks, layout by layout.

python -m benchmarks.plan                 # from the repository's root; some minutes on 2 cores
python -m benchmarks.plan --all           # with what every layout sends and keeps

Ends with an error where more than 1% lies between what is counted and what is planned.
"""

import argparse
import os
import sys

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dr import DRConfig
from tests.mcore import _counted, conftest  # noqa: F401  the latter makes Megatron run on the CPU
from tests.mcore._counted import Case
from tests.mcore._data import Layout

BF16 = dict(bf16=True, distributed_optimizer=True)
SP = dict(sequence_parallel=True)
AUTO = dict(gram="exact", alpha_style="auto", target_size=9, alpha_steps=9)
RANK = DRConfig(rows="rank", gram="exact")
SLOTS = DRConfig(slots=2, gram="exact")
SKETCH = DRConfig(slots=2, gram="sketch", sketch_size=64)
CASES: dict[str, Case] = {
    "1 rank, 4 slots, sketches": Case(
        Layout(bf16=True), DRConfig(slots=4, gram="sketch", sketch_size=64)),
    "dp2, overlap": Case(Layout(dp=2, overlap=True, **BF16), RANK),
    "dp2, overlap, in pieces": Case(Layout(dp=2, overlap=True, **BF16), RANK, piece=1000),
    "dp2, no distributed optimizer, 2 slots": Case(Layout(dp=2), SLOTS),
    "dp2, 2 slots in bf16, gradients too": Case(
        Layout(dp=2, overlap=True, bf16_buffers=True, **BF16),
        DRConfig(slots=2, slot_dtype="bf16", gram="exact")),
    "dp2, sketches": Case(Layout(dp=2, **BF16), SKETCH),
    "tp2, LayerNorm and biases, sketches": Case(
        Layout(tp=2, layer_norm=True, bf16=True, **SP), SKETCH),
    "pp2, tied embedding, sketches": Case(Layout(pp=2, tied=True), SKETCH),
    "cp2, 2 slots": Case(Layout(cp=2, **BF16), SLOTS),
    "dp4, rows of 2, overlap": Case(
        Layout(dp=4, overlap=True, overlap_param_gather=True, row_ranks=2, **BF16),
        DRConfig(rows="rank", gram="exact", row_ranks=2)),
    "dp4, rows of 2, in pieces": Case(
        Layout(dp=4, row_ranks=2, **BF16),
        DRConfig(rows="rank", gram="exact", row_ranks=2), piece=1000),
    "dp4, halves": Case(Layout(dp=4, **BF16), DRConfig(rows="rank", **AUTO)),
    "dp4, 1 target rank": Case(
        Layout(dp=4, target_ranks=1, overlap=True, **BF16),
        DRConfig(rows="rank", gram="exact", target_ranks=1)),
    "dp4, 1 row of ranks, 2 slots, halves": Case(
        Layout(dp=4, row_ranks=4, targets=8, sequences=4, **BF16),
        DRConfig(slots=2, row_ranks=4, **AUTO)),
    "tp2 dp2, overlap": Case(Layout(tp=2, dp=2, overlap=True, **SP, **BF16), RANK),
    "tp2 dp2, q and k norms, no distributed optimizer": Case(
        Layout(tp=2, dp=2, qk_layernorm=True), RANK),
    "pp2 dp2, tied embedding, overlap, 2 slots": Case(
        Layout(pp=2, dp=2, tied=True, overlap=True, **BF16), SLOTS),
    "pp2 vpp2 dp2": Case(Layout(pp=2, vpp=2, dp=2), RANK),
    "MoE ep2 dp4": Case(Layout(dp=4, ep=2, moe=True, **BF16), RANK),
    "dp8, rows of 4, overlap": Case(
        Layout(dp=8, targets=8, sequences=4, overlap=True, row_ranks=4, **BF16),
        DRConfig(rows="rank", gram="exact", row_ranks=4)),
    "dp8, 2 target ranks, halves": Case(
        Layout(dp=8, target_ranks=2, overlap=True, **BF16),
        DRConfig(rows="rank", target_ranks=2, **AUTO)),
    "tp2 pp2 dp2, no distributed optimizer": Case(
        Layout(tp=2, pp=2, dp=2, bf16=True, **SP), RANK),
    "tp2 pp2 dp2, overlap": Case(
        Layout(tp=2, pp=2, dp=2, overlap=True, **SP, **BF16), RANK),
    "tp2 cp2 dp2": Case(Layout(tp=2, cp=2, dp=2, **SP, **BF16), RANK),
    "MoE tp2 ep2 dp4": Case(Layout(tp=2, ep=2, dp=4, moe=True, **SP, **BF16), RANK),
    "pp4 dp2, 2 slots": Case(Layout(pp=4, dp=2, **BF16), SLOTS),
    "tp2 dp4, sketches": Case(
        Layout(tp=2, dp=4, **BF16), DRConfig(rows="rank", gram="sketch", sketch_size=64)),
}  # fmt: skip
# What the summary adds up, by the name of a figure (`_counted.compare`).
SUMS = {
    "plain, in a node": ("plain ", "inside nodes"), "plain, between": ("plain ", "between nodes"),
    "in a node": ("ours ", "inside nodes"), "between nodes": ("ours ", "between nodes"),
    "between rows": ("ours ", "between rows"), "memory": ("stage ", ""),
}  # fmt: skip


def off(found: float, said: float) -> float:
    """In percent; 400 bytes are scalars."""
    return 0.0 if abs(said - found) <= 400 else 100 * (said / found - 1) if found else float("inf")


def everything(figures: _counted.Figures, title: str) -> Table:
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    out.add_column("of a rank", no_wrap=True)
    for head in ("counted", "planned", "off %"):
        out.add_column(head, justify="right")
    for what, (found, said) in figures.items():
        if found or said:
            out.add_row(what, f"{found:,.0f}", f"{said:,.0f}", f"{off(found, said):+.2f}")
    return out


def summary(measured: dict[str, _counted.Figures]) -> Table:
    """Counted bytes of a rank, added up over stages, and the largest difference of any figure."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("layout", no_wrap=True)
    for head in (*SUMS, "off %"):
        out.add_column(head, justify="right")
    for name, figures in measured.items():
        cells = [
            sum(found for what, (found, _) in figures.items()
                if what.startswith(start) and what.endswith(end))
            for start, end in SUMS.values()
        ]  # fmt: skip
        out.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{worst(figures):.2f}")
    return out


def worst(figures: _counted.Figures) -> float:
    return max(abs(off(*each)) for each in figures.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of layouts; none: all")
    parser.add_argument("--all", action="store_true", help="every figure")
    arguments = parser.parse_args()
    names = arguments.names or list(CASES)
    console = Console(width=140)
    measured = {}
    for name, figures in _counted.measured({name: CASES[name] for name in names}):
        measured[name] = figures
        if arguments.all or worst(figures) > 1:
            console.print(everything(figures, name))
    console.print(summary(measured))
    return int(max(map(worst, measured.values())) > 1)


if __name__ == "__main__":
    sys.exit(main())
