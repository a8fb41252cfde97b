"""How good sketched grams are, on real gradients: `python benchmarks/sketch.py` (a minute or two).

Prints the tables of docs/sketches.md and draws docs/sketch_errors.png. Legend: B blocks, M rows,
R = M + 1 (the target last), N elements, K sketch size.
"""

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

warnings.filterwarnings("ignore")

import sketch_gradients  # noqa: E402  first: it switches Megatron-Core to the CPU
import sketch_plot  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from sketch_gradients import Gradients  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_dr.projection import (  # noqa: E402
    Cone,
    CountSketch,
    Hull,
    TopK,
    block_of,
    gram_and_error,
    gram_of,
    key_of,
    norm_scale,
    split,
)

PLOT = Path(__file__).resolve().parent.parent / "docs" / "sketch_errors.png"
SIZES = (256, 1024, 4096, 8192, 16384, 65536)
RIDGE, FRACTION = 0.3, 0.25  # the plugin's defaults
BY_BATCH = 8192  # the size of the table of batches
ALL = slice(None)

# what is measured -> column of the table; the errors first
ERRORS = {
    "gram": "gram",
    "estimate": "estimate",
    "halves": "of halves",
    "products": "products",
    "cross": "cross",
    "cone": "cone's w",
    "hull": "hull's w",
}
MEANS = {
    "topk": "top-k kept",
    "score": "their score",
    "cosine": "cosine",
    "target": "cos target kept",
}


@dataclass
class Draws:
    """Measurements of one kind of blocks and one size, over batches and seeds."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def summary(self, name: str, chosen: slice = ALL) -> float:
        """Root mean square of an error, mean of anything else, over the chosen draws."""
        values = torch.tensor(self.values[name][chosen])
        return float(values.square().mean().sqrt() if name in ERRORS else values.mean())


Results = dict[tuple[str, int], Draws]


def layers(gradients: Gradients) -> dict[str, list[str]]:
    """Block -> its parameters' names, for blocks that are layers."""
    blocks: dict[str, list[str]] = {}
    for name in gradients:
        blocks.setdefault(block_of(name, "layer"), []).append(name)
    return blocks


def exact(gradients: Gradients) -> Tensor:
    """Gram of every layer [B, R, R]."""
    parts = [torch.cat([gradients[n] for n in names], 1) for names in layers(gradients).values()]
    return torch.cat([gram_of(part_RN[None]) for part_RN in parts])


def sketched(gradients: Gradients, size: int, seed: int) -> Tensor:
    """Sketches of every layer [B, R, K]; their sum is the sketch of the model."""
    sketch, blocks = CountSketch(size, seed), layers(gradients)
    out_BRK = torch.zeros(len(blocks), sketch_gradients.ROWS + 1, size)
    for out_RK, names in zip(out_BRK, blocks.values(), strict=True):
        for name in names:
            index_N = torch.arange(gradients[name].shape[1])
            sketch.add_(out_RK, gradients[name], index_N, key_of(name))
    return out_BRK


def measure(exact_BRR: Tensor, rows_BRK: Tensor) -> dict[str, float]:
    """What a sketch does to a gram and to what is computed from it (docs/sketches.md, the terms).

    Over blocks, squared differences and squared norms are summed before their quotient is taken.
    """
    gram_BRR, error_sq_B = gram_and_error(rows_BRK)
    half = rows_BRK.shape[2] // 2
    halves_BRR = gram_of(rows_BRK[..., :half]) - gram_of(rows_BRK[..., half:])
    length_BR = exact_BRR.diagonal(dim1=1, dim2=2).sqrt()
    scaled_BRR = (gram_BRR - exact_BRR) / (length_BR[:, :, None] * length_BR[:, None])
    first, second = torch.triu_indices(*gram_BRR.shape[1:], offset=1)
    true, found = split(exact_BRR), split(gram_BRR)
    cone, cone_found = Cone(RIDGE).weights(*true[:2]), Cone(RIDGE).weights(*found[:2])
    hull, hull_found = Hull(RIDGE).weights(*true[:2]), Hull(RIDGE).weights(*found[:2])
    kept, kept_found = TopK(FRACTION).weights(*true[:2]), TopK(FRACTION).weights(*found[:2])
    # all directions are compared in the exact inner product
    direction, direction_found = scaled(exact_BRR, cone), scaled(gram_BRR, cone_found)
    target = torch.zeros_like(direction)
    target[:, -1] = 1.0
    return {
        "gram": relative(gram_BRR - exact_BRR, exact_BRR),
        "estimate": float((error_sq_B.sum() / gram_BRR.square().sum()).sqrt()),
        "halves": relative(halves_BRR, gram_BRR),
        "products": float(scaled_BRR[:, first, second].square().mean().sqrt()),
        "cross": relative(found[1] - true[1], true[1]),
        "cone": relative(cone_found - cone, cone),
        "hull": relative(hull_found - hull, hull),
        "topk": float(((kept > 0) & (kept_found > 0)).sum() / (kept > 0).sum()),
        "score": float((kept_found * true[1]).sum() / (kept * true[1]).sum()),
        "cosine": cosine(exact_BRR, direction_found, direction),
        "target": cosine(exact_BRR, direction_found, target) / cosine(exact_BRR, direction, target),
    }


def relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm())


def scaled(gram_BRR: Tensor, weights_BM: Tensor) -> Tensor:
    """Coefficients [B, R] of the direction, as long as the mean row in every block."""
    direction_BR = torch.nn.functional.pad(weights_BM, (0, 1))
    return direction_BR * norm_scale("general", gram_BRR, direction_BR)[:, None]


def cosine(gram_BRR: Tensor, a_BR: Tensor, b_BR: Tensor) -> float:
    """Of two directions of the whole model."""

    def dot(x_BR: Tensor, y_BR: Tensor) -> Tensor:
        return torch.einsum("br,brs,bs->", x_BR, gram_BRR, y_BR)

    return float(dot(a_BR, b_BR) / (dot(a_BR, a_BR) * dot(b_BR, b_BR)).sqrt())


def run(batches: list[Gradients], seeds: int, results: Results) -> Iterator[None]:
    """Every size and seed on every batch; one step of the iterator each."""
    for number, gradients in enumerate(batches):
        exact_BRR = exact(gradients)
        for size in SIZES:
            for seed in range(seeds):
                rows_BRK = sketched(gradients, size, seed + 1000 * number)
                layer, model = results[("layer", size)], results[("model", size)]
                layer.add(measure(exact_BRR, rows_BRK))
                model.add(measure(exact_BRR.sum(0, keepdim=True), rows_BRK.sum(0, keepdim=True)))
                yield


def table(results: Results) -> str:
    """Markdown: a row per kind of blocks and size."""
    columns = ERRORS | MEANS
    lines = [f"| blocks | K | {' | '.join(columns.values())} |", "|---" * (len(columns) + 2) + "|"]
    for (kind, size), draws in results.items():
        cells = [f"{draws.summary(name):.3f}" for name in columns]
        lines.append(f"| {kind} | {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def batch_table(results: Results, batches: list[Gradients], seeds: int) -> str:
    """Markdown: a row per batch, blocks = model."""
    names, draws = ("gram", "cone", "topk", "score"), results["model", BY_BATCH]
    titles = " | ".join((ERRORS | MEANS)[name] for name in names)
    lines = [f"| batch | largest cosine of a row and the target | {titles} |", "|---" * 6 + "|"]
    for number, gradients in enumerate(batches):
        gram_RR = exact(gradients).sum(0)
        length_R = gram_RR.diagonal().sqrt()
        largest = (gram_RR[:-1, -1] / (length_R[:-1] * length_R[-1])).max()
        chosen = slice(number * seeds, (number + 1) * seeds)
        cells = " | ".join(f"{draws.summary(name, chosen):.3f}" for name in names)
        lines.append(f"| {number + 1} | {largest:.2f} | {cells} |")
    return "\n".join(lines)


def trust(results: Results) -> str:
    """How the error of one draw lies to its estimate."""
    ratios = [
        torch.tensor(draws.values["gram"]) / torch.tensor(draws.values["estimate"])
        for draws in results.values()
    ]
    low, high = torch.cat(ratios).quantile(torch.tensor([0.05, 0.95]))
    means = torch.stack([ratio.square().mean().sqrt() for ratio in ratios])
    return (
        f"error of a draw: {low:.2f} to {high:.2f} of its estimate in nine of ten; root mean "
        f"square over the draws of a line: {means.min():.2f} to {means.max():.2f}"
    )


def describe(batches: list[Gradients]) -> str:
    """What the gradients are like: cosines and effective numbers of vectors and elements."""
    grams = torch.stack([exact(g).sum(0) for g in batches])
    length = grams.diagonal(dim1=1, dim2=2).sqrt()
    cosines = grams / (length[:, :, None] * length[:, None])
    first, second = torch.triu_indices(*cosines[0, :-1, :-1].shape, offset=1)
    square = torch.stack([torch.cat(list(g.values()), 1).double().square().sum(0) for g in batches])
    trace = grams.diagonal(dim1=1, dim2=2).sum(1)
    vectors = (trace**2 / grams.square().sum((1, 2))).mean()
    elements = (trace**2 / square.square().sum(1)).mean()
    return (
        f"cosine of two rows {cosines[:, first, second].mean():.2f} on average (rms "
        f"{cosines[:, first, second].square().mean().sqrt():.2f}), of a row and the target "
        f"{cosines[:, :-1, -1].mean():.2f}; effective vectors tr(A)^2/|A|^2 = {vectors:.1f} of "
        f"{grams.shape[1]}, effective elements tr(A)^2/sum |x_n|^4 = {elements:,.0f} of "
        f"{square.shape[1]:,}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, default=3, help="of 16 rows and a target")
    parser.add_argument("--seeds", type=int, default=8, help="sketches of each size and batch")
    parser.add_argument("--plot", type=Path, default=PLOT, help="picture to write")
    options = parser.parse_args()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        batches = sketch_gradients.batches(options.batches, progress)
        results: Results = {(k, s): Draws() for k in ("model", "layer") for s in SIZES}
        task = progress.add_task("sketching", total=options.batches * len(SIZES) * options.seeds)
        for _ in run(batches, options.seeds, results):
            progress.advance(task)
    console.print(describe(batches), soft_wrap=True)
    console.print(trust(results), soft_wrap=True)
    print(f"{table(results)}\n\n{batch_table(results, batches, options.seeds)}")
    sketch_plot.draw(results, sketch_gradients.ROWS + 1, options.plot)
    console.print(f"picture: {options.plot}")


if __name__ == "__main__":
    main()
