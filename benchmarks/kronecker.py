"""How good sample rows' Kronecker sketches are, on real gradients: error and time by their size.

    python benchmarks/kronecker.py      # some minutes on one core

The gradients are those of `sketch.py` (the SFT example's model, a row for each sentence). Every
matrix is sketched by itself, as in the layers' backward. Printed for each wanted error, and for the
sizes that used to be the default: the error of a product with the target relative to the two
lengths, as measured and as the log estimates it; the share of top-k's choice that is right; the
error of the whole model's cosine of mean row and target; the FLOPs over the weight gradient's.
"""

import argparse
import warnings

warnings.filterwarnings("ignore")

import sketch_gradients  # noqa: E402  first: it switches Megatron-Core to the CPU
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402
from sketch_gradients import Gradients  # noqa: E402

from megatron_dr.projection import TopK, flops  # noqa: E402
from megatron_dr.projection.kronecker import Kronecker, sizes_for  # noqa: E402
from megatron_dr.projection.sketch_error import product_errors  # noqa: E402

ERRORS = (0.05, 0.1, 0.15, 0.2, 0.3)
FIXED = (16, 32, 64)
FRACTION, TOKENS = 0.25, sketch_gradients.LENGTH
Found = dict[str, float]


def matrices(gradients: Gradients) -> dict[str, torch.Tensor]:
    """[R, O, I] of every matrix, by its I: the model's width, or the feed-forward layer's."""
    inner = {n: 384 if "linear_fc2" in n else 128 for n, g in gradients.items() if g.shape[1] > 384}
    return {n: gradients[n].unflatten(1, (-1, width)) for n, width in inner.items()}


def sketched(name: str, g_ROI: torch.Tensor, sizes: tuple[int, int], seed: int) -> torch.Tensor:
    """[R, K_out, K_in]."""
    sketch = Kronecker(name, *g_ROI.shape[1:], *sizes, seed)
    out, inner = (sketch.columns(side, None, "cpu", torch.float32) for side in ("out", "in"))
    g_RKI = g_ROI if out is None else out @ g_ROI
    return g_RKI if inner is None else g_RKI @ inner.t()


def measure(parts: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]], seed: int) -> Found:
    """Of all matrices; squares are summed before their quotient is taken."""
    wrong = seen = lengths = right = kept = 0.0
    exact, found = torch.zeros(3), torch.zeros(3)  # of mean row and target: product, squares
    for name, g_ROI in parts.items():
        c_RKK = sketched(name, g_ROI, sizes[name], seed)
        rows, target = g_ROI[:-1].flatten(1), g_ROI[-1].flatten()
        short, goal = c_RKK[:-1].flatten(1), c_RKK[-1].flatten()
        cross, guess = rows @ target, short @ goal
        error, length = product_errors(c_RKK[:-1], c_RKK[-1], g_ROI.shape[1:])
        wrong += float((guess - cross).square().sum())
        lengths += float(rows.square().sum() * target.square().sum())
        seen += float(error / length) * float(rows.square().sum() * target.square().sum())
        gram = torch.zeros(1, len(rows), len(rows))
        best, chosen = (TopK(FRACTION).weights(gram, c[None]) > 0 for c in (cross, guess))
        right, kept = right + float((best & chosen).sum()), kept + float(best.sum())
        for sums, r, t in ((exact, rows, target), (found, short, goal)):
            mean = r.mean(0)
            sums += torch.stack([mean @ t, mean @ mean, t @ t])
    cosine = [float(s[0] / (s[1] * s[2]).sqrt()) for s in (exact, found)]
    return {"wrong": wrong / lengths, "seen": seen / lengths, "right": right / kept,
            "cosine": (cosine[0] - cosine[1]) ** 2}  # fmt: skip


def work(shape: torch.Size, sizes: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of scoring a batch of the rows' number, and of the weight gradient."""
    one = flops.Work(*shape, sketch_gradients.ROWS, TOKENS, 0, *sizes, gram=False)
    return flops.sketched(one), flops.weight_gradient(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=3, help="of 16 rows and a target")
    parser.add_argument("--seeds", type=int, default=8, help="sketches of each size and batch")
    options = parser.parse_args()
    console = Console(stderr=True)
    table = Table("sizes", "product", "as estimated", "cosine", "top-k right", "FLOPs / dW")
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        batches = sketch_gradients.batches(options.batches, progress)
        every = [matrices(b) for b in batches]
        kinds = {f"{k} x {k}": {n: (k, k) for n in every[0]} for k in FIXED}
        kinds |= {f"error {e}": {n: sizes_for(e, *g.shape[1:]) for n, g in every[0].items()}
                  for e in ERRORS}  # fmt: skip
        task = progress.add_task("sketching", total=len(kinds))
        for title, sizes in kinds.items():
            draws = [
                measure(parts, sizes, seed) for parts in every for seed in range(options.seeds)
            ]
            mean = {k: sum(d[k] for d in draws) / len(draws) for k in draws[0]}
            spent = [work(g.shape[1:], sizes[n]) for n, g in every[0].items()]
            cost = sum(s for s, _ in spent) / sum(w for _, w in spent)
            table.add_row(title, *(f"{mean[k] ** 0.5:.3f}" for k in ("wrong", "seen", "cosine")),
                          f"{mean['right']:.3f}", f"{cost:.2f}")  # fmt: skip
            progress.advance(task)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
