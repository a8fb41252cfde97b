"""What a training step costs with the plugin, beside plain Megatron-Core in the same run.

    python benchmarks/step.py                 # 2 ranks: time, wire and memory; 5 minutes on 2 cores
    python benchmarks/step.py --ranks 4 --node 2      # more ranks than cores: no time
    python benchmarks/step.py --bucket 0              # nothing is reduced in the backward

A GPTModel with random tokens, DDP, the distributed optimizer and Megatron's schedule on gloo ranks
of one thread each, with its reduction overlapped. Every figure is also a ratio against plain
Megatron, which steps in the same ranks in the same repetition. A time ratio is the median over the
repetitions of the ratio within each, with quartiles; the parts of a projection are the fastest by
the clock. Where other work shares the machine only the CPU time is worth reading. How:
`step_arms.py`.

With a target rank, the ranks compute as many microbatches each as plain Megatron's, one of them of
the target role only: the step sees that much less general data.
"""

import argparse
import dataclasses
import json
import os
import pickle
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np  # noqa: E402
import step_arms  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing  # noqa: E402
from machine import processor  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from step_arms import Arm, Measured, Sizes  # noqa: E402

from megatron_dr import DRConfig  # noqa: E402

PARTS = ("sketch", "exchange", "solve", "combine")
MIB = 2**20
PLAIN = "plain"


@dataclasses.dataclass
class Times:
    """First quartile, median and third over the repetitions."""

    ms: list[float]
    ratio: list[float]  # to plain Megatron, within each repetition
    ratio_same: list[float]  # to plain Megatron with as many microbatches


@dataclasses.dataclass
class Result:
    """Of one arm over all ranks."""

    microbatches: int
    wire_bytes: int
    wire_ratio: float
    between_ratio: float  # bytes to other nodes
    early: float  # share of the bytes that is sent before the last backward ends
    peak_bytes: int
    extra_bytes: int
    peak_ratio: float
    extra_gradients: float  # extra peak memory, in Megatron's gradient buffers
    clock: Times | None = None
    cpu: Times | None = None
    laps_ms: dict[str, float] = dataclasses.field(default_factory=dict)  # the fastest


def arms(sizes: Sizes, ranks: int) -> dict[str, Arm]:
    """By name; the first is what the others are compared with."""
    n_g, n_t = sizes.general, sizes.target

    def cone(**dials: Any) -> Arm:
        return Arm(n_g, n_t, DRConfig(set="cone", **dials))

    out = {
        PLAIN: Arm(n_g, 0, None),
        "plain, target mixed in": Arm(n_g + n_t, 0, None),
        "off: mean, no target": Arm(n_g, 0, DRConfig(set="mean")),
    }
    for slots in (2, 4):
        out[f"cone, {slots} slots, sketch"] = cone(slots=slots, gram="sketch")
        out[f"cone, {slots} slots, exact"] = cone(slots=slots, gram="exact")
    out["cone, rank rows, sketch"] = cone(rows="rank", gram="sketch")
    out["cone, rank rows, exact"] = cone(rows="rank", row_ranks=1, gram="exact")
    if ranks > sizes.node > 1:
        out["cone, rows of a node, exact"] = cone(rows="rank", row_ranks=sizes.node, gram="exact")
    dr = DRConfig(rows="rank", row_ranks=1, target_ranks=1, gram="exact")
    out["cone, target rank, exact"] = Arm(n_g, n_g, dr)
    return out


def measure(
    ranks: int, arms: dict[str, Arm], sizes: Sizes, repetitions: int
) -> list[dict[str, Measured]]:
    """What each rank found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            step_arms.work, (ranks, folder, arms, sizes, repetitions), ranks, start_method="fork"
        )
        return [pickle.loads((Path(folder) / f"rank{r}").read_bytes()) for r in range(ranks)]


def quartiles(values: np.ndarray) -> list[float]:
    return [float(v) for v in np.percentile(values, (25, 50, 75))]


def summarise(arms: dict[str, Arm], ranks: list[dict[str, Measured]]) -> dict[str, Result]:
    """Bytes of the rank with most; times of the slowest rank in each repetition."""

    def most(name: str, what: str) -> Any:
        return np.max([getattr(rank[name], what) for rank in ranks], axis=0)

    plain_wire, plain_peak = most(PLAIN, "wire_bytes"), most(PLAIN, "peak_bytes")
    plain_between = max(most(PLAIN, "between_bytes"), 1)
    plain = {arm.run: name for name, arm in reversed(arms.items()) if arm.dr is None}
    out = {}
    for name, arm in arms.items():
        sent, peak = most(name, "wire_bytes"), most(name, "peak_bytes")
        extra = int(peak - plain_peak)
        result = out[name] = Result(
            arm.run, int(sent), sent / plain_wire, most(name, "between_bytes") / plain_between,
            most(name, "early_bytes") / sent, int(peak), extra, peak / plain_peak,
            extra / ranks[0][name].gradient_bytes,
        )  # fmt: skip
        if not ranks[0][name].step_ms:
            continue
        result.clock, result.cpu = (
            Times(
                quartiles(most(name, what)),
                quartiles(most(name, what) / most(PLAIN, what)),
                quartiles(most(name, what) / most(plain[arm.run], what)),
            )
            for what in ("step_ms", "cpu_ms")
        )
        for part in PARTS:
            laps = [rank[name].laps_ms[part] for rank in ranks if part in rank[name].laps_ms]
            if laps:
                result.laps_ms[part] = float(np.max(laps, axis=0).min())
    return out


def time_table(results: dict[str, Result]) -> Table:
    out = _table(
        "arm", "micro-\nbatches", "CPU\nms", "/ plain\n(quartiles)", "/ as many micro-\nbatches",
        "clock\nms", "/ plain\n", "/ as\nmany", *(f"{part}\nms" for part in PARTS),
    )  # fmt: skip
    for name, result in results.items():
        assert result.clock is not None and result.cpu is not None
        out.add_row(
            name,
            str(result.microbatches),
            f"{result.cpu.ms[1]:,.0f}",
            *(f"{middle:.2f} ({low:.2f}-{high:.2f})"
              for low, middle, high in (result.cpu.ratio, result.cpu.ratio_same)),
            f"{result.clock.ms[1]:,.0f}",
            *(f"{ratio[1]:.2f}" for ratio in (result.clock.ratio, result.clock.ratio_same)),
            *(f"{result.laps_ms[p]:.0f}" if p in result.laps_ms else "" for p in PARTS),
        )  # fmt: skip
    return out


def bytes_table(results: dict[str, Result]) -> Table:
    out = _table("arm", "sent MiB", "/ plain", "between nodes\n/ plain", "sent in the\nbackward",
                 "peak MiB", "more", "/ plain", "in grad buffers")  # fmt: skip
    for name, result in results.items():
        out.add_row(
            name,
            f"{result.wire_bytes / MIB:.1f}",
            f"{result.wire_ratio:.3f}",
            f"{result.between_ratio:.3f}",
            f"{result.early:.0%}",
            f"{result.peak_bytes / MIB:.1f}",
            f"{result.extra_bytes / MIB:+z.1f}",
            f"{result.peak_ratio:.2f}",
            f"{result.extra_gradients:+z.2f}",
        )
    return out


def _table(first: str, *heads: str) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column(first, no_wrap=True)
    for head in heads:
        out.add_column(head, justify="right", no_wrap=True)
    return out


def draw(results: dict[str, Result], caption: str, path: Path) -> None:
    """Bars of the ratios: time where it was measured, wire, memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = results[PLAIN].clock is not None
    figure, axes = plt.subplots(
        1, 2 + timed, figsize=(6 + 4 * timed, 4.6), sharey=True, layout="constrained"
    )
    place = np.arange(len(results))
    wire = [r.wire_ratio for r in results.values()]
    peak = [r.peak_ratio for r in results.values()]
    if timed:
        _draw_time(axes[0], results)
    for axis, values, title in (
        (axes[-2], wire, "bytes sent per rank and step"),
        (axes[-1], peak, "peak memory of a rank's tensors"),
    ):
        axis.barh(place, values, color=["#999999" if n.startswith(PLAIN) else "#1f77b4"
                                        for n in results])  # fmt: skip
        for y, value in enumerate(values):
            axis.text(value, y, f" {value:.2f}", va="center", fontsize=8)
        axis.set_title(title, fontsize=10)
    for axis in axes:
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("ratio to plain Megatron (no unit)")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
    axes[0].set_yticks(place, list(results))
    axes[0].invert_yaxis()
    figure.suptitle(f"A training step beside plain Megatron-Core\n{caption}", fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_time(axis: Any, results: dict[str, Result]) -> None:
    """Median and quartiles; what plain Megatron needs for as many microbatches in grey."""
    plain = {r.microbatches: r.cpu.ratio[1] for n, r in results.items()
             if n.startswith(PLAIN) and r.cpu}  # fmt: skip
    for y, (name, result) in enumerate(results.items()):
        assert result.cpu is not None
        low, middle, high = result.cpu.ratio
        compute = min(middle, plain[result.microbatches])
        axis.barh(y, compute, color="#999999")
        if not name.startswith(PLAIN):
            axis.barh(y, middle - compute, left=compute, color="#1f77b4")
        axis.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", capsize=3)
        axis.text(high, y, f"  {middle:.2f}", va="center", fontsize=8)
    axis.set_title("CPU time, lines: quartiles\n(grey: plain, as many microbatches)", fontsize=10)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default, text in (
        ("ranks", 2, "data-parallel ranks, at least 2"), ("repetitions", 7, "timed steps per arm"),
        ("layers", 8, "of the model"), ("hidden", 256, "size"), ("vocabulary", 4096, "tokens"),
        ("sequence", 128, "tokens"), ("micro-batch", 4, "sequences"),
        ("general", 4, "general microbatches per rank and step; a multiple of 4"),
        ("target", 1, "target microbatches per rank and step"),
        ("bucket", 1_000_000, "parameters of a bucket, reduced in the backward; 0: after it"),
        ("node", 1, "neighbouring ranks of a node"),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--json", type=Path, help="write settings and figures to this file")
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    sizes = Sizes(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(Sizes)})
    cores = len(os.sched_getaffinity(0))
    timed = chosen.repetitions if chosen.ranks <= cores else 0
    table_of_arms = arms(sizes, chosen.ranks)
    found = measure(chosen.ranks, table_of_arms, sizes, timed)
    results = summarise(table_of_arms, found)
    parameters = found[0][PLAIN].gradient_bytes / 4e6
    caption = (
        f"{chosen.ranks} gloo ranks, {parameters:.1f}M parameters, {sizes.general} general and "
        f"{sizes.target} target microbatches of {sizes.micro_batch} x {sizes.sequence} tokens"
    )
    where = (
        f"{processor()}, {cores} cores; torch {torch.__version__}, megatron-core "
        f"{version('megatron-core')}"
    )
    console = Console(width=max(Console().width, 160))
    console.print(f"{caption}; {timed} repetitions; {where}", soft_wrap=True)
    if timed:
        console.print(time_table(results))
    else:
        console.print(f"no times: {chosen.ranks} ranks on {cores} cores wait for one another")
    console.print(bytes_table(results))
    if chosen.json:
        figures = {name: dataclasses.asdict(result) for name, result in results.items()}
        settings = {"ranks": chosen.ranks, "repetitions": timed, **dataclasses.asdict(sizes)}
        content = {"settings": settings, "machine": where, "arms": figures}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")
    if chosen.plot:
        draw(results, caption, chosen.plot)


if __name__ == "__main__":
    main()
