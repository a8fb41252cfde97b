"""What one GPU says of the plugin, in under 8 minutes; docs/gpu.md.

    megatron-dr gpu-check --out runs/gpu_check
    megatron-dr gpu-check --out runs/gpu_check --parts maths,buffers

One process. It needs torch, numpy and megatron-core; Transformer Engine's layers are checked where
it is installed. Without a GPU it runs small, on the CPU, and says what was skipped. A part that
fails, or is not done in its time, stops no other. Exit code 1: something failed.
"""

import argparse
import contextlib
import gc
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dr.cli import doctor
from megatron_dr.cli.gpu_report import Report
from megatron_dr.cli.main import parser_of

SECONDS = 470.0  # of it all
_GRACE = 15.0  # after its time a part that the device holds ends the process


class Part(NamedTuple):
    """Where a part is, in megatron_dr.mcore.gpu_check or here, and the most seconds it may take."""

    place: str
    seconds: float
    what: str


PARTS = {
    "doctor": Part("", 60, "what is installed"),
    "maths": Part("maths:maths", 40, "solvers, sets, grams and sketches against the CPU"),
    "buffers": Part("paths:buffers", 75, "rows in gradient buffers against autograd row by row"),
    "layers": Part("paths:layers", 90, "sample rows against autograd sample by sample"),
    "repeat": Part("paths:repeat", 40, "the same bits twice"),
    "waits": Part("waits:waits", 30, "where the host waits for the device in a step"),
    "step": Part("cost:step", 150, "time and memory of a billion parameters beside plain Megatron"),
    "parts": Part("parts:parts", 30, "gram, weighted sum, sketch and solve beside a copy"),
    "trace": Part("trace:trace", 45, "a profiler's trace of a step"),
}
_SPARED = ("psutil", "safetensors")  # what a run needs and the check does not
# before torch is imported
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # else cuBLAS need not give the same bits twice
    "TORCHDYNAMO_DISABLE": "1",  # compiling would take the minutes that are measured
    "TOKENIZERS_PARALLELISM": "false",
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("gpu-check", __doc__)
    out, parts = "runs/gpu_check", ",".join(PARTS)
    parser.add_argument("--out", type=Path, default=Path(out), metavar="DIR",
                        help=f"folder of report.json, report.txt and traces ({out})")  # fmt: skip
    parser.add_argument("--parts", default=parts, help=f"some of {parts} (default: all)")
    parser.add_argument("--small", action="store_true", help="sizes cut down; so without a GPU")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: there is no such part; there are {', '.join(PARTS)}")
    return args


def run(name: str, where: Any, report: Report, end: float) -> None:
    """One part: each line is kept as it is found; an error is the report's, and stops no other."""
    from megatron_dr.mcore.gpu_check.found import Late

    report.begin(name)
    before, limit = time.monotonic(), min(PARTS[name].seconds, end - time.monotonic())
    try:
        if limit <= 0:
            raise Late("the check's time was over before it")
        with _limited(limit, report):
            for found in _findings(name, where):
                report.add(name, found)
    except (Exception, Late) as error:  # whatever it is, the next part goes on
        text = str(error) if isinstance(error, Late) else traceback.format_exc(limit=-6)
        report.fail(name, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", text)
    report.end(name, time.monotonic() - before)


def _findings(name: str, where: Any) -> Iterator[Any]:
    from megatron_dr.mcore.gpu_check import start
    from megatron_dr.mcore.gpu_check.found import FAILED, OK, Found

    if name == "doctor":
        for each in doctor.examine_all():
            spared = each.state == "MISSING" and each.name in _SPARED
            state = OK if each.state == "ok" else "absent"
            note = f"{each.found}; a run needs it: {each.mend}" if spared else each.found
            yield Found(each.name, FAILED if each.bad and not spared else state, {}, note)
        return
    start.ready(where.device)
    yield from pkgutil.resolve_name(f"megatron_dr.mcore.gpu_check.{PARTS[name].place}")(where)


@contextlib.contextmanager
def _limited(seconds: float, report: Report) -> Iterator[None]:
    """Late after so many seconds; where the device holds the process even then, it ends: what was
    found by then is written."""

    from megatron_dr.mcore.gpu_check.found import Late

    def late(*_: Any) -> None:  # the signal and the frame
        raise Late(f"not done in {seconds:.0f} s")

    def over() -> None:
        report.close("the device did not answer: run the other parts by --parts")
        os._exit(1)

    watchdog = threading.Timer(seconds + _GRACE, over)
    watchdog.daemon = True
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    watchdog.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        watchdog.cancel()


def _answers(device: Any) -> bool:
    """Give back what a part held; whether the device still answers: after an error in a kernel it
    does not, for the rest of the process."""
    import torch

    gc.collect()
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where something failed."""
    args, end = arguments(argv), time.monotonic() + SECONDS
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    args.out.mkdir(parents=True, exist_ok=True)
    from megatron_dr.mcore.gpu_check.found import Where
    from megatron_dr.mcore.gpu_check.start import device

    on = device()
    where = Where(on, args.small or on.type == "cpu", args.out)
    report = Report(args.out, on)
    with open(args.out / "log.txt", "w") as log:
        for number, name in enumerate(args.parts):
            print(f"{name}: {PARTS[name].what}", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(log):  # what attach says of each arm
                run(name, where, report, end)
            if not _answers(on):
                report.close(f"the device stopped answering in {name}: run the rest by --parts "
                             f"{','.join(args.parts[number + 1 :]) or name}")  # fmt: skip
                break
    report.show()
    return int(report.bad)
