"""The batched solver beside a plain loop over blocks: seconds and accuracy.

    python benchmarks/solver.py      # 1 to 2 minutes on one core; uses a GPU too where there is one

A program is a block of M Gaussian rows with 2M elements and an unrelated target; its gram is scaled
so that tr(G)/M = 1, and the ridge added. The loop is, for the cone, `scipy.optimize.nnls` on the
Cholesky factor (min |L'w - L^-1 l|; the factor's time counts), and for the hull and the capped hull
(f = 1/4) `quadprog.solve_qp` (Goldfarb and Idnani's dual active set). Both get the same H and l.
Needs the extra `benchmarks`.

Shape suffixes: M rows, N elements, B blocks.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
import quadprog  # noqa: E402
import torch  # noqa: E402
from machine import processor  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402
from scipy.linalg import cholesky, solve_triangular  # noqa: E402
from scipy.optimize import nnls  # noqa: E402

from megatron_dr.projection import kkt_residual, solve_qp  # noqa: E402

BLOCKS, ROWS, RIDGES, REPEATS = 400, (16, 64, 128), (0.3, 0.0), 3
SETS = ("cone", "hull", "capped 1/4")


def program(rows: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """H [B, M, M] and l [B, M]."""
    generator = torch.Generator().manual_seed(rows)
    J_BMN = torch.randn(BLOCKS, rows, 2 * rows, generator=generator, dtype=torch.float64)
    t_BN1 = torch.randn(BLOCKS, 2 * rows, 1, generator=generator, dtype=torch.float64)
    G_BMM = J_BMN @ J_BMN.mT
    scale_B11 = G_BMM.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    H_BMM = G_BMM / scale_B11 + ridge * torch.eye(rows, dtype=torch.float64)
    return H_BMM, (J_BMN @ t_BN1 / scale_B11)[..., 0] + ridge / rows


def bounds(name: str, rows: int) -> tuple[float | None, float | None]:
    """The upper bound of a weight, and what the weights sum to."""
    return (4.0 / rows if name == "capped 1/4" else None), (None if name == "cone" else 1.0)


def loop(name: str, H_BMM: np.ndarray, l_BM: np.ndarray) -> np.ndarray:
    """w [B, M], a block at a time."""
    rows = l_BM.shape[1]
    if name == "cone":
        return np.stack([cone(H, linear) for H, linear in zip(H_BMM, l_BM, strict=True)])
    upper, _ = bounds(name, rows)
    columns, at_least = [np.ones((rows, 1)), np.eye(rows)], [np.ones(1), np.zeros(rows)]
    if upper is not None:
        columns, at_least = [*columns, -np.eye(rows)], [*at_least, np.full(rows, -upper)]
    C, b = np.hstack(columns), np.concatenate(at_least)
    return np.stack(
        [quadprog.solve_qp(H, linear, C, b, 1)[0] for H, linear in zip(H_BMM, l_BM, strict=True)]
    )


def cone(H_MM: np.ndarray, l_M: np.ndarray) -> np.ndarray:
    factor = cholesky(H_MM, lower=True)
    return nnls(factor.T, solve_triangular(factor, l_M, lower=True))[0]


def fastest(run: Callable[[], torch.Tensor], device: str) -> tuple[float, torch.Tensor]:
    """Seconds of the fastest of three runs, and the weights.

    On the CPU those of its one thread, so that other work on the machine does not count.
    """
    clock, seconds = time.process_time if device == "cpu" else time.perf_counter, []
    for _ in range(REPEATS):
        start = clock()
        weights_BM = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return min(seconds), weights_BM.cpu()


def row(name: str, rows: int, ridge: float, devices: list[str]) -> list[str]:
    H_BMM, l_BM = program(rows, ridge)
    upper, sum_to = bounds(name, rows)
    arrays = H_BMM.numpy(), l_BM.numpy()

    def batched(device: str) -> tuple[float, torch.Tensor]:
        H, linear = H_BMM.to(device), l_BM.to(device)
        return fastest(lambda: solve_qp(H, linear, upper=upper, sum_to=sum_to), device)

    def residual(weights_BM: torch.Tensor) -> str:
        return f"{kkt_residual(H_BMM, l_BM, weights_BM, upper, sum_to).max():.0e}"

    plain, w_BM = fastest(lambda: torch.from_numpy(loop(name, *arrays)), "cpu")
    cells = [name, f"{ridge:g}", str(rows), f"{plain:.3f}", residual(w_BM)]
    for device in devices:
        seconds, w_BM = batched(device)
        cells += [f"{seconds:.3f}", f"{plain / seconds:.2f}", residual(w_BM)]
    return cells


def main() -> None:
    console, devices = Console(), ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    console.print(f"cpu: {processor()}, one thread; torch {torch.__version__}")
    table = Table("set", "ridge", "M", "loop, s", "its KKT", title=f"{BLOCKS} blocks")
    for device in devices:
        for head in (f"{device}, s", "loop / it", "its KKT"):
            table.add_column(head)
        if device == "cuda":
            console.print(f"cuda: {torch.cuda.get_device_name()}")
    cases = [(name, m, ridge) for ridge in RIDGES for name in SETS for m in ROWS]
    for case in track(cases, description="solving", console=console, transient=True):
        table.add_row(*row(*case, devices))
    console.print(table)
    console.print(f"s: fastest of {REPEATS}. KKT: largest relative residual.")


if __name__ == "__main__":
    main()
