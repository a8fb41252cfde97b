"""The picture of `sketch.py`: errors against the sketch's size."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

Results = dict[tuple[str, int], Any]  # kind of blocks, K -> draws
COLOURS = {"model": "#1f77b4", "layer": "#d95f02"}


def draw(results: Results, num_vectors: int, path: Path) -> None:
    """Left: the gram, its estimates and the bound. Right: what is computed from the gram."""
    sizes = np.array(sorted({size for _, size in results}))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    _gram(left, results, sizes, num_vectors)
    _consequences(right, [results["model", size] for size in sizes], sizes)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="sketch size K (elements per row and block)")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2)
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    figure.suptitle("Sketches of real gradients: 16 rows and a target of a 0.5M-parameter GPT")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _gram(axis: Any, results: Results, sizes: np.ndarray, num_vectors: int) -> None:
    bound = np.sqrt((num_vectors + 1) / sizes)
    axis.plot(sizes, bound, "k--", label=f"bound: sqrt((R + 1)/K), R = {num_vectors}")
    for kind, colour in COLOURS.items():
        draws = [results[kind, size] for size in sizes]
        error = np.array([d.summary("gram") for d in draws])
        spread = np.array([np.percentile(d.values["gram"], [5, 95]) for d in draws])
        shift = 0.96 if kind == "model" else 1.04  # so that the bars don't hide one another
        axis.errorbar(
            sizes * shift, error, np.abs(spread.T - error), fmt="o", color=colour, capsize=3,
            label=f"measured, blocks = {kind} (bars: 5 to 95 %)",
        )  # fmt: skip
        estimate = [d.summary("estimate") for d in draws]
        axis.plot(sizes, estimate, "-", color=colour, label=f"estimate in the log, {kind}")
        halves = [d.summary("halves") for d in draws]
        axis.plot(sizes, halves, ":", color=colour, label=f"difference of two halves, {kind}")
    axis.set_ylabel("relative Frobenius error of the gram (no unit)")
    axis.set_title("Error of the sketched gram")


def _consequences(axis: Any, draws: list[Any], sizes: np.ndarray) -> None:
    for name, label, style in (
        ("cross", "cross c, relative to |c|", "s-"),
        ("products", "product of two vectors, relative to |x||y|", "^-"),
        ("cone", "cone's weights, relative to |w|", "o-"),
        ("hull", "hull's weights, relative to |w|", "v-"),
    ):
        axis.plot(sizes, [d.summary(name) for d in draws], style, label=label)
    missed = [1 - d.summary("topk") for d in draws]
    axis.plot(sizes, missed, "P:", label="share of the top-k rows missed")
    label = "1 - cosine of the cone's direction and the exact one"
    turned = [1 - d.summary("cosine") for d in draws]
    axis.plot(sizes, turned, "D--", color="black", label=label)
    axis.set_ylabel("error (no unit)")
    axis.set_title("What is computed from it, blocks = model")
