"""A profiler's trace of a step: for chrome://tracing or ui.perfetto.dev, and what takes longest.

Of two layers as wide and long as the billion-parameter model's, so that the file stays small.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from megatron_dr.mcore.gpu_check.cost import ARMS
from megatron_dr.mcore.gpu_check.found import MEASURED, Found, Where, failed
from megatron_dr.mcore.gpu_check.model import LARGE, SMALL, Model
from megatron_dr.mcore.gpu_check.parts import wait
from megatron_dr.mcore.gpu_check.start import lacks, start

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_ARMS = ("plain Megatron", "cone, 4 slots, exact", "cone, 4 slots, sketch",
         "topk of samples, sketched")  # fmt: skip


def trace(where: Where) -> Iterator[Found]:
    """A file each of plain Megatron's step and of the plugin's."""
    start(where.device)
    kind = "local" if lacks("te", "bf16", where.device) else "te"
    sizes = SMALL if where.small else dataclasses.replace(LARGE, layers=2)
    model = Model(sizes, where.device, kind, "bf16")
    general, target = model.batches(1, sizes.general), model.batches(2, sizes.target)
    for name in _ARMS:
        try:
            model.attach(ARMS[name])
            for _ in range(2):
                model.gradients(general, target)
                model.optimizer.step()
            wait(where)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if where.cuda else [])]
            with profile(activities=activities) as profiler:
                model.gradients(general, target)
                model.optimizer.step()
                wait(where)
            yield _written(name, profiler, where)
        except Exception as error:
            yield failed(name, error)
        finally:
            model.attach(None)


def _written(name: str, profiler: Any, where: Where) -> Found:
    stem = name.replace(",", "").replace(" ", "_")
    path = where.out / f"trace_{stem}.json.gz"
    profiler.export_chrome_trace(str(path))
    events = profiler.key_averages()
    by = "self_device_time_total" if where.cuda else "self_cpu_time_total"
    (where.out / f"trace_{stem}.txt").write_text(events.table(sort_by=by, row_limit=40))
    figures: dict[str, float | str] = {"file": path.name}
    if where.cuda:
        kernels = [e for e in events if e.device_type.name == "CUDA"]
        kernels = [e for e in kernels if not e.is_user_annotation]  # which spans kernels
        figures["kernels ms"] = sum(e.self_device_time_total for e in kernels) / 1e3
        figures["host waits"] = sum(e.count for e in events if e.key in _WAITS)
    return Found(name, MEASURED, figures)
