"""What a projection's own arithmetic costs on one core, beside a copy of the same bytes.

    python benchmarks/products.py        # a minute

Products in float64 of float32 pieces, and in float32 with the runs summed in float64 (what exact
grams take), each with the error of the gram relative to its largest diagonal element; then the
weighted sum. Processor time, fastest of 7, in copies of P x N float32 elements.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_dr.projection import gram_of_long  # noqa: E402

ELEMENTS, PIECE = 1 << 21, 1 << 18


def fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return min(times)


def by_pieces(rows_PN: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor]) -> object:
    width = PIECE // len(rows_PN)
    return sum(product(piece.clone()) for piece in rows_PN.split(width, 1))


def in_float64(piece_PN: torch.Tensor) -> torch.Tensor:
    wide = piece_PN.double()
    return wide @ wide.T


def in_runs(piece_PN: torch.Tensor) -> torch.Tensor:
    return gram_of_long([piece_PN])


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title=f"copies of P x {ELEMENTS:,} float32 elements; one core")
    for title in ("P vectors", "float64", "float32 runs", "error", "weighted sum", "both"):
        table.add_column(title, justify="right")
    for vectors in (3, 5, 9, 17, 33):
        rows_PN = torch.randn(vectors, ELEMENTS)
        out, weights_P = torch.empty_like(rows_PN), torch.randn(vectors)
        copy = fastest(lambda rows=rows_PN, out=out: out.copy_(rows))
        wide = fastest(lambda rows=rows_PN: by_pieces(rows, in_float64)) / copy
        runs = fastest(lambda rows=rows_PN: by_pieces(rows, in_runs)) / copy
        combined = fastest(lambda rows=rows_PN, weights=weights_P: weights @ rows) / copy
        exact, found = by_pieces(rows_PN, in_float64), by_pieces(rows_PN, in_runs)
        error = (found - exact).abs().max() / exact.diagonal().max()  # type: ignore[operator, attr-defined]
        cells = (f"{wide:.2f}", f"{runs:.2f}", f"{error:.0e}", f"{combined:.2f}")
        table.add_row(str(vectors), *cells, f"{runs + combined:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
