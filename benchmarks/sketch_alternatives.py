"""CountSketch beside other sketches, on real gradients: `python benchmarks/sketch_alternatives.py`.

Prints the table of docs/sketches.md (about a minute). The random numbers of the others come from a
generator: they are here to be compared, for one process. Legend: M rows, R = M + 1 (the target
last), N elements, K sketch size, L elements of a run.
"""

import time
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore")

import sketch_gradients  # noqa: E402  first: it switches Megatron-Core to the CPU
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import pad  # noqa: E402

from megatron_dr.projection import Cone, CountSketch, gram_of, split  # noqa: E402

SIZES, SEEDS, BATCHES, RIDGE = (1024, 8192, 65536), 8, 2, 0.3
TIMED, TIMED_SIZE, REPEATS = 1 << 20, 8192, 7  # elements, K, of which the fastest counts

Apply = Callable[[Tensor], Tensor]  # one row [N] -> its sketch [K]


def random(seed: int, elements: int) -> tuple[torch.Generator, Tensor]:
    """A generator, and a random sign for each element."""
    generator = torch.Generator().manual_seed(seed)
    return generator, 2.0 * torch.randint(0, 2, (elements,), generator=generator) - 1.0


def count_sketch(elements: int, size: int, seed: int) -> Apply:
    """Ours, with the generator's buckets and signs: a row's time is without the hash, as below."""
    generator, sign_N = random(seed, elements)
    bucket_N = torch.randint(0, size, (elements,), generator=generator)
    return lambda x_N: torch.zeros(size).scatter_add_(0, bucket_N, sign_N * x_N)


def sjlt(elements: int, size: int, seed: int) -> Apply:
    """Four CountSketches of a quarter of the size (Kane and Nelson, J. ACM 61(1), 2014)."""
    parts = [count_sketch(elements, size // 4, 4 * seed + i) for i in range(4)]
    return lambda x_N: torch.cat([part(x_N) for part in parts]) / 2.0


def fold(run: int) -> Callable[[int, int, int], Apply]:
    """Signed runs of L neighbours are added to a random place, in order: no scatter in a run."""

    def make(elements: int, size: int, seed: int) -> Apply:
        generator, sign_N = random(seed, elements)
        runs = -(-elements // run)
        place = torch.randint(0, size // run, (runs,), generator=generator)

        def apply(x_N: Tensor) -> Tensor:
            signed = pad(sign_N * x_N, (0, runs * run - elements)).view(runs, run)
            return torch.zeros(size // run, run).index_add_(0, place, signed).view(-1)

        return apply

    return make


def srht(elements: int, size: int, seed: int) -> Apply:
    """Signs, a Hadamard transform of the whole vector, K of its elements (Ailon and Chazelle)."""
    generator, sign_N = random(seed, elements)
    padded = 1 << (elements - 1).bit_length()
    chosen = torch.randperm(padded, generator=generator)[:size]

    def apply(x_N: Tensor) -> Tensor:
        y, half = pad(sign_N * x_N, (0, padded - elements)), 1
        while half < padded:
            y = y.view(-1, 2, half)
            y = torch.stack([y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]], 1)
            half *= 2
        return y.view(-1)[chosen] / size**0.5

    return apply


SKETCHES: dict[str, Callable[[int, int, int], Apply]] = {
    "CountSketch": count_sketch,
    "SJLT, 4 per element": sjlt,
    "fold, runs of 16": fold(16),
    "fold, runs of 64": fold(64),
    "SRHT": srht,
}


def errors(rows_RN: Tensor, apply: Apply) -> tuple[float, float]:
    """Relative errors of the gram and of the cone's weights."""
    exact_BRR = gram_of(rows_RN[None])
    gram_BRR = gram_of(torch.stack([apply(x_N) for x_N in rows_RN])[None])
    weights, found = (Cone(RIDGE).weights(*split(g)[:2]) for g in (exact_BRR, gram_BRR))
    gram = (gram_BRR - exact_BRR).norm() / exact_BRR.norm()
    return float(gram), float((found - weights).norm() / weights.norm())


def milliseconds(function: Callable[[], object]) -> float:
    """The fastest of several runs, after one that does not count."""
    times = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times[1:])


def main() -> None:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:40}"), BarColumn(), TimeElapsedColumn())
    lines = ["| sketch | " + " | ".join(f"gram, K = {k:,} | cone's w" for k in SIZES) + " | ms |",
             "|---" * (2 * len(SIZES) + 2) + "|"]  # fmt: skip
    timed_N = torch.randn(TIMED)
    with Progress(*columns, console=console) as progress:
        batches = sketch_gradients.batches(BATCHES, progress)
        flat = [torch.cat(list(gradients.values()), 1) for gradients in batches]
        task = progress.add_task("sketching", total=len(SKETCHES) * len(SIZES) * SEEDS * BATCHES)
        for name, make in SKETCHES.items():
            cells = []
            for size in SIZES:
                found = []
                for seed in range(SEEDS):
                    apply = make(flat[0].shape[1], size, seed)
                    for rows_RN in flat:
                        found.append(errors(rows_RN, apply))
                        progress.advance(task)
                cells += [f"{e:.3f}" for e in torch.tensor(found).square().mean(0).sqrt()]
            apply = make(TIMED, TIMED_SIZE, 0)
            cells.append(f"{milliseconds(lambda apply=apply: apply(timed_N)):.1f}")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    print("\n".join(lines))
    sketch, index_N = CountSketch(TIMED_SIZE, 0), torch.arange(TIMED)
    for rows in (1, 9):
        out, values = torch.zeros(rows, TIMED_SIZE), [timed_N] * rows
        spent = milliseconds(lambda out=out, values=values: sketch.add_(out, values, index_N, 1))
        console.print(f"CountSketch.add_ of {rows} rows of {TIMED:,} elements: {spent:.1f} ms")


if __name__ == "__main__":
    main()
