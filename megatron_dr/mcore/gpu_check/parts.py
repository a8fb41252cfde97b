"""The projection's parts beside a copy of the same bytes on the device: figures are ratios.

0.5 is the least for what only reads, since a copy also writes. A solve's bytes are its grams', of
which a copy is all launch: its milliseconds say more than its ratio.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.buffer_rows.rows import BufferRows
from megatron_dr.mcore.buffer_rows.sketched_gram import SketchedGram
from megatron_dr.mcore.gpu_check.found import MEASURED, Found, Where
from megatron_dr.mcore.gpu_check.model import LARGE, SMALL, Model
from megatron_dr.mcore.gpu_check.start import start
from megatron_dr.projection import CountSketch, gram_of_long, solve_qp

GIB = 2**30


def parts(where: Where) -> Iterator[Found]:
    """Gram and solve on tensors; sketch and weighted sum on the gradient buffers of two layers as
    wide as the billion-parameter model's."""
    rate = copy_rate(where)
    yield Found("copy", MEASURED, {"copied GiB/s": rate / GIB})

    def beside(name: str, work: Callable[[], object], num_bytes: int) -> Found:
        ms, copy = milliseconds(work, where), 1e3 * num_bytes / rate
        return Found(name, MEASURED, {"ms": ms, "copy ms": copy, "/ copy": ms / copy})

    for rows in (5, 17):
        x_RN = torch.randn(rows, 20_000 if where.small else 1 << 26, device=where.device)
        yield beside(f"gram, {rows} rows", partial(gram_of_long, [x_RN]), x_RN.nbytes)
        del x_RN
    for blocks, rows in ((1, 16), (200, 16), (1, 128)):
        x_BMN = torch.randn(blocks, rows, 256, dtype=torch.float64, device=where.device)
        H, c = x_BMN @ x_BMN.mT, x_BMN.mean(2)
        for kind, total in (("cone", None), ("hull", 1.0)):
            work = partial(solve_qp, H, c, upper=None, sum_to=total)
            yield beside(f"solve, {kind}, {blocks} blocks of {rows} rows", work, H.nbytes)
    yield from (beside(*one) for one in of_buffers(where))


def of_buffers(where: Where) -> list[tuple[str, Callable[[], object], int]]:
    """What sketches and combines a step's gradient buffers: its name, and the bytes it reads."""
    start(where.device)
    sizes = SMALL if where.small else dataclasses.replace(LARGE, layers=2)
    model = Model(sizes, where.device, "local", "bf16")
    model.attach(DRConfig(slots=4, gram="sketch"))
    assert model.handle is not None and isinstance(rows := model.handle.rows, BufferRows)
    assert isinstance(rows.source, SketchedGram)
    buffers, layout, size = rows.buffers, rows.layout, rows.source.size
    buffers.begin_step(with_target=True)
    number, blocks = len(buffers.present()), len(layout.names)
    num_bytes = number * model.gradient_bytes
    out_BLK = torch.zeros(blocks, number, size, device=where.device)
    mean_BL = torch.full((blocks, number), 1.0 / number, device=where.device).double()
    sketch = CountSketch(size, 1)
    return [
        (f"sketch of {size:,}, {number} buffers",
         lambda: buffers.sketch_(out_BLK, sketch, layout.blocks), num_bytes),
        (f"weighted sum, {number} buffers",
         lambda: buffers.combine_(mean_BL, layout.blocks), num_bytes),
    ]  # fmt: skip


# -- clocks ----------------------------------------------------------------------------------------
def wait(where: Where) -> None:
    """Until the device has done what it was given."""
    if where.cuda:
        torch.cuda.synchronize(where.device)


def copy_rate(where: Where) -> float:
    """Bytes per second of a copy on the device: each is read and written."""
    source = torch.ones((1 << 20) if where.small else (1 << 28), device=where.device)
    into = torch.empty_like(source)
    num_bytes: int = source.nbytes
    return 1e3 * num_bytes / milliseconds(lambda: into.copy_(source), where)


def milliseconds(work: Callable[[], object], where: Where, times: int = 5) -> float:
    """The fastest of a few runs after two that are not looked at; events on a device, which is
    waited for around each."""
    for _ in range(2):
        work()
    found: list[float] = []
    for _ in range(1 if where.small else times):
        if where.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            wait(where)
            begin.record()
            work()
            end.record()
            end.synchronize()
            found.append(float(begin.elapsed_time(end)))
        else:
            before = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - before))
    return max(min(found), 1e-6)
