"""The plan's bytes and memory beside those of real runs on 2 to 8 gloo ranks, layout by layout.

python -m benchmarks.plan                 # from the repository's root; some minutes on 2 cores

Twelve other layouts of 1 to 4 ranks are a test: `tests/mcore/test_plan.py`.
"""

import argparse
import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dr import DRConfig
from tests.mcore import _counted, conftest  # noqa: F401  the latter makes Megatron run on the CPU
from tests.mcore._counted import Case
from tests.mcore._data import Layout

BF16 = dict(bf16=True, distributed_optimizer=True)
RANK = DRConfig(rows="rank", gram="exact")
CASES: dict[str, Case] = {
    "dp2, sketches": (
        Layout(dp=2, **BF16), DRConfig(slots=2, gram="sketch", sketch_size=64)),
    "dp4, 1 target rank": (
        Layout(dp=4, target_ranks=1, overlap=True, **BF16),
        DRConfig(rows="rank", gram="exact", target_ranks=1)),
    "dp4, one row of ranks, halves": (
        Layout(dp=4, row_ranks=4, targets=8, sequences=4, **BF16),
        DRConfig(slots=2, row_ranks=4, gram="exact", alpha_style="auto", target_size=9,
                 alpha_steps=9)),
    "tp2 dp2, q and k norms, no distributed optimizer": (
        Layout(tp=2, dp=2, qk_layernorm=True), RANK),
    "pp2 vpp2 dp2": (Layout(pp=2, vpp=2, dp=2), RANK),
    "dp8, rows of 4": (
        Layout(dp=8, targets=8, sequences=4, overlap=True, row_ranks=4, **BF16),
        DRConfig(rows="rank", gram="exact", row_ranks=4)),
    "dp8, 2 target ranks, halves": (
        Layout(dp=8, target_ranks=2, overlap=True, **BF16),
        DRConfig(rows="rank", gram="exact", target_ranks=2, alpha_style="auto", target_size=9,
                 alpha_steps=9)),
    "tp2 pp2 dp2, no distributed optimizer": (
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True, bf16=True), RANK),
    "tp2 pp2 dp2, overlap": (
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True, overlap=True, **BF16), RANK),
    "tp2 cp2 dp2": (Layout(tp=2, cp=2, dp=2, sequence_parallel=True, **BF16), RANK),
    "MoE tp2 ep2 dp4": (
        Layout(tp=2, ep=2, dp=4, moe=True, sequence_parallel=True, **BF16), RANK),
    "pp4 dp2, 2 slots": (
        Layout(pp=4, dp=2, **BF16), DRConfig(slots=2, gram="exact")),
    "tp2 dp4, sketches": (
        Layout(tp=2, dp=4, **BF16), DRConfig(rows="rank", gram="sketch", sketch_size=64)),
}  # fmt: skip


def table(figures: _counted.Figures, title: str) -> Table:
    out = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    out.add_column("of a rank", no_wrap=True)
    for head in ("counted", "planned", "off %"):
        out.add_column(head, justify="right")
    for what, (found, said) in figures.items():
        if found or said:
            off = 100 * (said / found - 1) if found else float("inf")
            out.add_row(what, f"{found:,.0f}", f"{said:,.0f}", f"{off:+.2f}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of layouts; none: all")
    names = parser.parse_args().names or list(CASES)
    console = Console(width=100)
    for name, figures in _counted.measured({name: CASES[name] for name in names}).items():
        console.print(table(figures, name))


if __name__ == "__main__":
    main()
