"""The plan's seconds of a step beside those of real runs on 2 gloo ranks.

    python benchmarks/plan_seconds.py                # 5 minutes on 2 quiet cores

Each run is one of `megatron_dr.train`, and its plan that of `megatron-dr plan` by the same flags.
The hardware's numbers are measured first, as anybody would measure theirs: bandwidth and latency of
a collective and of memory, by ranks that do nothing else; and the rate of products, from the first
run, plain Megatron's, which so counts for nothing. A rank has one thread and a core of its own. The
step's time is the first quartile of a run's; other work on the machine spoils it. Exit
code 1: a run is more than 15% off its plan.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing  # noqa: E402
from machine import processor  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_dr.cli import plan  # noqa: E402
from megatron_dr.compare import launch  # noqa: E402
from megatron_dr.compare.jobs import Job, job  # noqa: E402

RANKS = 2
STEPS, LEFT_OUT = 9, 1  # of a run; the first warms up
BAR = 15.0  # percent
TOKENIZER = Path(__file__).resolve().parents[1] / "examples" / "sft" / "tokenizer"
MODEL = f"""
    --num-attention-heads 8 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
    --attention-dropout 0 --tokenizer-type HuggingFaceTokenizer --tokenizer-model {TOKENIZER}
    --make-vocab-size-divisible-by 2048 --train-iters {STEPS} --lr 1e-4 --lr-decay-style constant
    --use-distributed-optimizer --log-interval 1 --dr-device cpu --eval-iters 0
"""
SMALL = {"num-layers": 4, "hidden-size": 512, "ffn-hidden-size": 1408, "seq-length": 256,
         "micro-batch-size": 1, "global-batch-size": 8}  # fmt: skip
PLAIN, TARGET = "--dr-set mean", "--dr-target-data {target} --dr-target-batch-size"


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its flags, and the sizes that are not those of `SMALL`."""

    flags: str = PLAIN
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def words(self, data: Path) -> str:
        sizes = SMALL | self.sizes
        sizes["max-position-embeddings"] = sizes["seq-length"]
        given = " ".join(f"--{name} {size}" for name, size in sizes.items())
        own = self.flags.format(target=data / "target.jsonl")
        return f"{MODEL} {given} --train-data-path {data / 'general.jsonl'} {own}"


FIRST = "dp2, plain"  # by which the rate is measured
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
TP, PP = "--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2"
SLOTS = f"{TARGET} 2 --dr-slots 4 --dr-gram exact --dr-alpha 0.1"
CASES = {
    FIRST: Case(),
    "dp2, plain, wider": Case(sizes={"hidden-size": 768, "ffn-hidden-size": 2048}),
    "dp2, plain, longer sequences": Case(sizes={"seq-length": 1024}),
    "dp2, plain, 2 sequences at once": Case(sizes={"micro-batch-size": 2}),
    "dp2, plain, full recompute": Case(
        f"{PLAIN} --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1"),
    "dp2, plain, overlap": Case(f"{PLAIN} {OVERLAP}"),
    "tp2, plain": Case(f"{PLAIN} {TP}"),
    "pp2, plain": Case(f"{PLAIN} {PP}"),
    "dp2, 1 row of each rank, auto": Case(f"{TARGET} 4 --dr-rows rank --dr-gram exact"),
    "the same, overlap": Case(f"{TARGET} 4 --dr-rows rank --dr-gram exact {OVERLAP}"),
    "dp2, 4 slots": Case(f"{SLOTS} {OVERLAP}"),
    "dp2, sketches": Case(
        f"{TARGET} 2 --dr-slots 4 --dr-gram sketch --dr-alpha 0.1 {OVERLAP}"),
    "tp2, 4 slots": Case(f"{SLOTS} {TP}"),
    "pp2, 4 slots": Case(f"{SLOTS} {PP}"),
}  # fmt: skip


def write(folder: Path) -> None:
    """Records that fill any sequence."""
    for name, count in (("general", 64), ("target", 8)):
        lines = [json.dumps({"text": f"{number:03d} and so on, " * 200}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def measure(cases: dict[str, Case], data: Path, out: Path, console: Console) -> dict[str, float]:
    """Seconds of a step."""
    jobs = {name: job(name, 0, STEPS, out / str(number), case.words(data))
            for number, (name, case) in enumerate(cases.items())}  # fmt: skip
    launch.train(list(jobs.values()), out, console, RANKS)
    return {name: _seconds(done) for name, done in jobs.items()}


def _seconds(done: Job) -> float:
    each = [line["step seconds"] for line in done.lines("train")]
    return float(np.quantile(each[LEFT_OUT:], 0.25))


@dataclasses.dataclass
class Machine:
    """Bytes a second of memory and of a collective, and seconds of a small one."""

    memory: float
    link: float
    latency: float


def machine() -> Machine:
    """As each rank has them while the other does the same."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "found"
        torch.multiprocessing.spawn(_rank, (str(file),), RANKS)
        return Machine(*json.loads(file.read_text()))


def _rank(rank: int, file: str) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)  # a new name in torch 2.15
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}.store", rank=rank, world_size=RANKS
    )
    big, small = torch.ones(2**23), torch.ones(2**10)
    copied, found = torch.empty_like(big), []
    parts = {id(each): torch.empty(each.numel() // RANKS) for each in (big, small)}

    def reduced(each: torch.Tensor) -> None:
        torch.distributed.reduce_scatter_tensor(parts[id(each)], each)

    for act, repeat in ((lambda: copied.copy_(big), 20), (lambda: reduced(big), 20),
                        (lambda: reduced(small), 500)):  # fmt: skip
        torch.distributed.barrier()
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            act()
            times.append(time.perf_counter() - began)
        found.append(statistics.median(times))
    if rank == 0:
        size = big.numel() * big.element_size()
        Path(file).write_text(json.dumps([2 * size / found[0], size / RANKS / found[1], found[2]]))


def planned(case: Case, data: Path, hardware: Path) -> dict[str, float]:
    """Seconds of a step by part, as `megatron-dr plan` prints them."""
    said = io.StringIO()
    words = ["--gpus", str(RANKS), "--hardware", str(hardware), "--json", "--vocab-size", "1"]
    with contextlib.redirect_stdout(said):
        code = plan.main([*words, *job("", 0, 0, data, case.words(data)).flags[:-2]])
    if code:
        raise ValueError(f"the plan of {case} ended with {code}")
    seconds = json.loads(said.getvalue())["seconds"]
    return seconds["plain" if PLAIN in case.flags else "ours"]


def rate(found: float, data: Path, file: Path, of: Machine) -> float:
    """Operations a second with which the plan of the first run is what was measured; the file then
    has the hardware."""
    write_hardware(file, 1e10, of)
    parts = planned(CASES[FIRST], data, file)
    rest = sum(parts.values()) - parts["computation"]  # nothing is hidden without overlap
    out = 1e10 * parts["computation"] / (found - rest)
    write_hardware(file, out, of)
    return out


def write_hardware(file: Path, flops: float, of: Machine) -> None:
    """As `megatron-dr plan --hardware FILE` reads it; all of it is measured."""
    link = f"{{bandwidth: {of.link:.6e}, latency: {of.latency:.6e}}}"
    file.write_text(f"flops: {flops:.6e}\nfp32: {flops:.6e}\nmemory_bandwidth: {of.memory:.6e}\n"
                    f"inside: {link}\nbetween: {link}\noverlaps: false\n")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of runs beside the first; none: all")
    names = parser.parse_args().names or list(CASES)
    console = Console(width=120)
    chosen = {name: CASES[name] for name in dict.fromkeys((FIRST, *names))}
    with tempfile.TemporaryDirectory() as scratch:
        data, file = Path(scratch), Path(scratch) / "hardware.yaml"
        write(data)
        of = machine()
        found = measure(chosen, data, data, console)
        flops = rate(found[FIRST], data, file, of)
        said = {name: planned(case, data, file) for name, case in chosen.items()}
    console.print(f"{processor()}: {flops / 1e9:.1f} GFLOP/s, memory {of.memory / 1e9:.1f} GB/s, "
                  f"a collective {of.link / 1e9:.2f} GB/s, {of.latency * 1e6:.0f} µs")  # fmt: skip
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True)
    for head in ("measured, s", "planned, s", "off %", "of it beside computation, s"):
        table.add_column(head, justify="right")
    off = {}
    for name, parts in said.items():
        whole = sum(parts.values())
        off[name] = 100 * (whole / found[name] - 1)
        of_it = "by it" if name == FIRST else f"{off[name]:+.1f}"
        rest = f"{whole - parts['computation']:.3f}"
        table.add_row(name, f"{found[name]:.3f}", f"{whole:.3f}", of_it, rest)
    console.print(table)
    return int(max(map(abs, off.values())) > BAR)


if __name__ == "__main__":
    sys.exit(main())
