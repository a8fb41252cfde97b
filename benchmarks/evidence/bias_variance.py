"""Bias and variance of the update's direction against the dial, per set, before fine-tuning.

    python benchmarks/evidence/bias_variance.py [--draws 40] [--out runs/evidence/bias]

mu is the gradient of 256 held-out Spanish sentences: the truth, as far as they tell. A draw is 8
other Spanish sentences (t) and 16 sentences of the pool (rows, one block), at the weights of
`sketch_gradients.py`'s model. u is a set's update at alpha (`projection/update.py`), times the one
number c that serves all draws best, as a learning rate would:

    c = E u.mu / E |u|^2
    bias^2 = |c E u - mu|^2 / |mu|^2 ,   variance = c^2 E |u - E u|^2 / |mu|^2

Their sum is 1 - (E u.mu)^2 / (E |u|^2 |mu|^2): 0 for mu itself, 1 for what knows nothing of it. E
is over draws; the mean of D draws is as far from E u as D of them say, which is taken off bias^2.
The picture is that of arXiv 2605.07063, measured.
"""

import argparse
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

warnings.filterwarnings("ignore")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import alpha  # noqa: E402
import sketch_gradients  # noqa: E402  before Megatron-Core, which it switches to the CPU
import torch  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from megatron_dr.compare import figures  # noqa: E402
from megatron_dr.compare.pictures import plt  # noqa: E402
from megatron_dr.data.file_samples import FileSamples  # noqa: E402
from megatron_dr.projection import (  # noqa: E402
    Cone,
    FeasibleSet,
    Filter,
    Hull,
    Mean,
    Span,
    TopK,
    gram_of,
    project,
)  # fmt: skip

SETS: dict[str, FeasibleSet] = {
    "mean (a plain mix)": Mean(), "cone": Cone(0.3), "hull": Hull(0.3), "span": Span(0.3),
    "topk, f 0.25": TopK(0.25), "filter": Filter(1.0),
}  # fmt: skip
ALPHAS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
POOLS = {"hidden": "a tenth of the pool is Spanish", "none": "no Spanish in the pool"}
TRUTH, ROWS, TARGETS = 256, sketch_gradients.ROWS, sketch_gradients.TARGET
Arm = tuple[str, float]


@dataclass
class Sums:
    """Over draws: of u, of |u|^2 and their number."""

    u_N: torch.Tensor | float = 0.0
    square: float = 0.0
    count: int = field(default=0)

    def add(self, u_N: torch.Tensor) -> None:
        self.u_N, self.square = self.u_N + u_N, self.square + float(u_N @ u_N)
        self.count += 1

    def found(self, mu_N: torch.Tensor) -> tuple[float, float]:
        """(bias^2, variance), both by |mu|^2."""
        mean_N, square, D = self.u_N / self.count, self.square / self.count, self.count
        c, length = float(mean_N @ mu_N) / square, float(mu_N @ mu_N)
        variance = (square - float(mean_N @ mean_N)) * D / (D - 1)
        distance = float((c * mean_N - mu_N).square().sum()) - c * c * variance / D
        return distance / length, c * c * variance / length


def flat(model: GPTModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A batch's gradient [N]."""
    return torch.cat(list(sketch_gradients.gradient(model, batch).values())).double()


def batch_of(lines: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """Lines of JSON as one batch of samples."""
    path = folder / "draw.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    samples = FileSamples(str(path), sketch_gradients._Tokenizer(), sketch_gradients.LENGTH)
    chosen = [samples[number] for number in range(len(samples))]
    return {name: torch.stack([s[name] for s in chosen]) for name in chosen[0]}


def measure(
    model: GPTModel, pool: str, draws: int, mu_N: torch.Tensor, folder: Path, progress: Progress
) -> dict[Arm, tuple[float, float]]:
    """(bias^2, variance) of each set and alpha."""
    sums = {(name, a): Sums() for name in SETS for a in ALPHAS}
    for seed in progress.track(range(draws), description=f"draws, pool {pool}"):
        target, general = alpha.draw(TARGETS, pool == "hidden", 1000 + seed)
        order = torch.randperm(len(general), generator=torch.Generator().manual_seed(seed))
        rows = batch_of([general[i] for i in order[:ROWS].tolist()], folder)
        single = [{k: v[i : i + 1] for k, v in rows.items()} for i in range(ROWS)]
        J_RN = torch.stack([*(flat(model, one) for one in single),
                            flat(model, batch_of(target, folder))])  # fmt: skip
        gram_1RR = gram_of(J_RN[None])
        for name, set_ in SETS.items():
            for a in ALPHAS:
                u_R = project(gram_1RR, set_, "general", a).update_BR[0]
                sums[name, a].add(u_R @ J_RN)
    return {arm: found.found(mu_N) for arm, found in sums.items()}


def draw_picture(all_found: dict[str, dict[Arm, tuple[float, float]]], draws: int, path: Path,
                 noise: float) -> None:  # fmt: skip
    """Variance against bias^2, a line for each set from alpha 0 to 1."""
    figure, axes = plt.subplots(1, len(all_found), figsize=(6.2 * len(all_found), 5.2),
                                layout="constrained", sharex=True, sharey=True)  # fmt: skip
    for axis, (pool, found) in zip(axes, all_found.items(), strict=True):
        for number, name in enumerate(SETS):
            points = [found[name, a] for a in ALPHAS]
            x, y = [b for b, _ in points], [v for _, v in points]
            axis.plot(x, y, ".-", color=f"C{number}", label=name)
            axis.plot(x[0], y[0], "o", color=f"C{number}", markersize=8)
        axis.plot(*found["cone", 1.0], "k*", markersize=14, label="the target alone (alpha 1)")
        for total in (0.4, 0.6, 0.8, 1.0):
            axis.plot([0, total], [total, 0], ":", color="0.7", linewidth=1)
        axis.set(xlim=(0, 1.02), ylim=(0, 0.75), xlabel="bias² (parts of |mu|²)",
                 title=POOLS[pool])  # fmt: skip
    axes[0].set_ylabel("variance (parts of |mu|²)")
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{TARGETS} targets, {ROWS} rows, {draws} draws; circles: alpha 0; dotted: equal sums; "
        f"the truth's own error: {noise:.2f}", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("runs/evidence/bias"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    console = Console()
    with Progress(console=Console(stderr=True)) as progress:
        model = sketch_gradients.build()
        task = progress.add_task("training the model", total=sketch_gradients.STEPS)
        sketch_gradients.train(model, lambda step, _: progress.update(task, completed=step))
        lines = (alpha.demo.DATA / "target_heldout.jsonl").read_text(encoding="utf-8")
        truth = lines.splitlines(keepends=True)[:TRUTH]
        parts = [flat(model, batch_of(truth[i : i + 8], options.out)) for i in range(0, TRUTH, 8)]
        mu_N = torch.stack(parts).mean(0)
        error = torch.stack(parts).var(0).sum() / len(parts) / (mu_N @ mu_N)
        found = {pool: measure(model, pool, options.draws, mu_N, options.out, progress)
                 for pool in POOLS}  # fmt: skip
    for pool, own in found.items():
        rows = []
        for name in SETS:
            best = min(ALPHAS, key=lambda a: sum(own[name, a]))
            ends = [f"{own[name, a][0]:.2f} + {own[name, a][1]:.2f}" for a in (0.0, 0.05, 0.3)]
            rows.append([name, *ends, f"{best:g}", f"{sum(own[name, best]):.3f}"])
        alone = own["cone", 1.0]
        rows.append(["the target alone", "", "", "", "1", f"{sum(alone):.3f}"])
        title = f"bias² + variance, parts of |mu|²: {POOLS[pool]}, {options.draws} draws"
        header = ["set", "alpha 0", "alpha 0.05", "alpha 0.3", "best alpha", "sum there"]
        figures.table(title, header, rows, options.out / f"{pool}.md", console)
    draw_picture(found, options.draws, options.out / "bias_variance.png", float(error))
    console.print(f"{options.out / 'bias_variance.png'}; the truth's own error: {error:.3f}")


if __name__ == "__main__":
    main()
