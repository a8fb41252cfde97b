"""What sample rows cost inside the layers' backward, beside plain Megatron-Core in the same run.

    python benchmarks/layer_path.py --json found.json --plot picture.png    # 35 minutes
    python benchmarks/layer_path.py --only 'sketched|ghost' --json found.json  # adds to the file

One process, fp32, a GPTModel with random tokens. Set topk, norm tokens, a block per matrix,
alpha 0, sketches of 64 x 64 numbers, unless an arm's name says otherwise. Plain Megatron steps on
the same general batch without the target; the other arms carry their target's share: samples beside
the general ones (`merged`) or in a microbatch of their own. A ratio is the median over the
repetitions of the ratio within each, with quartiles; the picture has that of processor time, which
other work disturbs least. How each is measured: `layer_path_arms.py`.

A second table: scoring alone, of single layers, in units of the weight gradient's GEMM, beside
what the FLOPs say (`projection/flops.py`), and what `auto` takes.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)  # Megatron's notes on every model

import layer_path_arms as layer_arms  # noqa: E402
import layer_path_scores as scores  # noqa: E402
import megatron.core  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layer_path_arms import PARTS, Arm, Measured, Sizes  # noqa: E402
from machine import processor  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_dr import DRConfig  # noqa: E402

PLAIN, PLAIN_TWO = "plain", "plain, 2 microbatches"
MIB = 2**20
SMALL = {"kronecker_out": 64, "kronecker_in": 64}  # sketches, unless an arm's name says otherwise
WANTED = {"kronecker_out": None, "kronecker_in": None, "sketch_error": 0.15}
COLOURS = ("#4c78a8", "#9ecae9", "#e45756", "#f2a541", "#999999")


def arms() -> dict[str, Arm]:
    """By name."""

    def topk(score: str, fraction: float = 0.5, **dials: Any) -> DRConfig:
        dials = {"set": "topk", "norm": "tokens", "target_pass": "merged", **SMALL, **dials}
        return DRConfig(
            rows="sample", blocks="matrix", alpha=dials.pop("alpha", 0.0), score=score,
            fraction=fraction, **dials,
        )  # fmt: skip

    own, cone = {"target_pass": "own"}, {"set": "cone", "norm": "general"}
    step = {"window": "step", "target_pass": "own"}
    out = {PLAIN: Arm(0, None), "plain, 1 more": Arm(1, None), PLAIN_TWO: Arm(0, None, 2)}
    for score in ("sketched", "ghost", "exact"):
        for fraction in (0.25, 0.5, 1.0):
            out[f"{score}, f {fraction:g}, 1 merged"] = Arm(1, topk(score, fraction))
    out |= {
        "auto, f 0.5, 1 merged": Arm(1, topk("auto")),
        "sketched, f 0.5, 2 merged": Arm(2, topk("sketched")),
        "sketched for error 0.15, f 0.5, 1 merged": Arm(1, topk("sketched", **WANTED)),
        "auto for error 0.15, f 0.5, 1 merged": Arm(1, topk("auto", **WANTED)),
        "sketched, f 0.5, 1 merged, alpha 0.05": Arm(1, topk("sketched", alpha=0.05)),
        "sketched, f 0.5, 1 own": Arm(1, topk("sketched", **own)),
        "sketched, f 0.5, 2 own": Arm(2, topk("sketched", **own)),
        "sketched, f 0.5, 2 own, every 2": Arm(2, topk("sketched", target_refresh=2, **own)),
        "ghost, f 0.5, 1 own": Arm(1, topk("ghost", **own)),
        "sketched, cone, 1 own": Arm(1, topk("sketched", **own, **cone)),
        "exact, cone, 1 own": Arm(1, topk("exact", **own, **cone)),
        "ghost, cone, 1 own": Arm(1, topk("ghost", **own, **cone)),
        "sketched, f 0.5, step, 1 pass": Arm(1, topk("sketched", **step), 2),
        "sketched, f 0.5, step, 2 passes": Arm(1, topk("sketched", passes=2, **step), 2),
        "ghost, f 0.5, step, 2 passes": Arm(1, topk("ghost", passes=2, **step), 2),
    }
    return out


def reference(arm: Arm) -> str:
    """Plain Megatron with as many microbatches."""
    return PLAIN if arm.microbatches == 1 else PLAIN_TWO


def measure(table: dict[str, Arm], sizes: Sizes, repetitions: int) -> dict[str, Measured]:
    models, found = {}, {}
    for name, arm in track(list(table.items()), "building and memory", transient=True):
        models[name], found[name] = layer_arms.prepare(arm, sizes)
    for repetition in track(range(repetitions), "timing", transient=True):
        names = list(models)
        random.Random(repetition).shuffle(names)
        layer_arms.repeat(models, found, names)
    return found


def summarise(table: dict[str, Arm], found: dict[str, Measured]) -> dict[str, dict[str, Any]]:
    """Figures of each arm; ratios to plain Megatron with as many microbatches."""
    out = {}
    for name, result in found.items():
        plain = found[reference(table[name])]
        out[name] = {
            "targets": table[name].targets,
            "step ms": float(np.median(result.step_ms)),
            "ratio": quartiles(result.step_ms, plain.step_ms),
            "CPU ratio": quartiles(result.cpu_ms, plain.cpu_ms),
            "parts ms": {part: float(np.median(ms)) for part, ms in result.parts_ms.items()},
            "plain ms": float(np.median(plain.step_ms)),
            "peak bytes": result.peak_bytes,
            "peak ratio": result.peak_bytes / plain.peak_bytes,
        }
    return out


def quartiles(values: list[float], of: list[float]) -> list[float]:
    return [float(q) for q in np.percentile(np.divide(values, of), (25, 50, 75))]


def arms_table(results: dict[str, dict[str, Any]]) -> Table:
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("arm", no_wrap=True)
    heads = ("step ms", "/ plain", "CPU / plain", *(f"{part} ms" for part in PARTS), "peak MiB",
             "/ plain")  # fmt: skip
    for head in heads:
        out.add_column(head, justify="right")
    for name, r in results.items():
        ratios = [f"{m:.2f} ({low:.2f}-{high:.2f})" for low, m, high in (r["ratio"],)]
        out.add_row(
            name, f"{r['step ms']:,.0f}", *ratios, f"{r['CPU ratio'][1]:.2f}",
            *(f"{r['parts ms'][part]:,.0f}" for part in PARTS),
            f"{r['peak bytes'] / MIB:,.0f}", f"{r['peak ratio']:.3f}",
        )  # fmt: skip
    return out


def draw(results: dict[str, dict[str, Any]], caption: str, path: Path) -> None:
    """Bars: a step's parts over plain's step, and peak memory over plain's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 1.5 + 0.3 * len(results)), sharey=True, layout="constrained",
        width_ratios=(3, 1),
    )  # fmt: skip
    for y, r in enumerate(results.values()):
        start, (low, middle, high) = 0.0, r["CPU ratio"]
        whole = sum(r["parts ms"].values())
        for part, colour in zip(PARTS, COLOURS, strict=True):
            width = r["parts ms"][part] / whole * middle
            left.barh(y, width, left=start, color=colour, label=part if y == 0 else None)
            start += width
        left.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", capsize=3)
        left.text(high, y, f"  {middle:.2f}", va="center", fontsize=8)
        right.barh(y, r["peak ratio"], color="#999999")
        right.text(r["peak ratio"], y, f" {r['peak ratio']:.3f}", va="center", fontsize=8)
    left.set_title("processor time of a step and its parts (bars: quartiles)", fontsize=10)
    right.set_title("peak memory of tensors", fontsize=10)
    for axis in (left, right):
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("ratio to plain Megatron (no unit)")
        axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
    left.set_yticks(range(len(results)), list(results))
    left.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(PARTS), fontsize=9)
    figure.suptitle(f"Sample rows inside the backward, beside plain Megatron-Core\n{caption}",
                    fontsize=11)  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for flag, default, text in (
        ("threads", 1, "of torch"), ("repetitions", 5, "timed steps per arm"),
        ("layers", 4, "of the model"), ("hidden", 512, "size"), ("vocabulary", 5120, "tokens"),
        ("sequence", 256, "tokens"), ("samples", 16, "general sequences of a step"),
    ):  # fmt: skip
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--only", default="", help="arms whose name has this regular expression, "
                        "beside plain Megatron; 'scores': the second table alone")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file of settings and figures; arms that are "
                        "in it and not run now are kept and shown")  # fmt: skip
    parser.add_argument("--plot", type=Path, help="picture to write")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    sizes = Sizes(**{f.name: getattr(chosen, f.name) for f in dataclasses.fields(Sizes)})
    torch.set_num_threads(chosen.threads)
    layer_arms.keep_freed_memory()
    store = dist.FileStore(f"{tempfile.mkdtemp()}/store", 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    where = (
        f"{processor()}, {chosen.threads} thread(s); torch {torch.__version__}, megatron-core "
        f"{megatron.core.__version__}"
    )
    known = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    if sizes.vocabulary % (sizes.samples * sizes.sequence) == 0:
        raise ValueError("plain Megatron's GEMMs over tokens are known by their shape: choose a "
                         "vocabulary that is no multiple of the tokens.")  # fmt: skip
    settings = {"threads": chosen.threads, **dataclasses.asdict(sizes)}
    if known and known["settings"] != settings:
        raise ValueError(f"{chosen.json} holds other settings: {known['settings']}.")
    table = arms()
    run = {name: arm for name, arm in table.items() if re.search(chosen.only, name)}
    run = {reference(arm): table[reference(arm)] for arm in run.values()} | run
    found = summarise(table, measure(run, sizes, chosen.repetitions)) if run else {}
    results = known.get("arms", {}) | found
    results = {name: results[name] for name in table if name in results}
    layers = known.get("scores", [])
    if not chosen.only or chosen.only == "scores":
        layers = scores.measure(chosen.repetitions)
    caption = (
        f"{sizes.layers} layers x {sizes.hidden}, vocabulary {sizes.vocabulary}, "
        f"{sizes.samples} general sequences of {sizes.sequence} tokens, {where}"
    )
    console = Console(width=max(Console().width, 170))
    console.print(caption, soft_wrap=True)
    console.print(arms_table(results))
    console.print(scores.table(layers))
    if chosen.json:
        content = {"settings": settings, "machine": where, "arms": results, "scores": layers}
        chosen.json.write_text(json.dumps(content, indent=2) + "\n")
    if chosen.plot:
        draw(results, caption, chosen.plot)


if __name__ == "__main__":
    main()
