"""Bytes of memory that are read and written where rows are multiplied, added up and sketched: by
the code as it is, and by a kernel that would read each number once and keep all else in registers.

Temporaries count as memory, though a GPU's cache holds small ones: what is sketched is a megabyte
of elements at a time, by 33 kernels and two more a row, whose launches take as long.

Legend: P sums of `rows.py`, L local buffers.
"""

from dataclasses import dataclass

from megatron_dr.plan import memory
from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.rows import Rows


@dataclass(frozen=True)
class Moved:
    """Bytes: of the code as it is, and at least."""

    now: float
    least: float

    def __mul__(self, times: float) -> "Moved":
        return Moved(self.now * times, self.least * times)


def products(stage: Stage, rows: Rows) -> Moved:
    """Of a shard's column, of every vector (`projection/gram.py`, gram_of_long): a read of each,
    one more where two parts are multiplied, a write and a read of each copy; and the products of
    runs of 512 columns."""
    each, sums = stage.layout.gradient_bytes, rows.of(stage.layout).sums
    again = 8 * memory.copies(stage, rows) + 4 * (memory.parts(stage, rows) == 2)
    return Moved(sums * (each + again) + 8 * sums**2 / 512, sums * each)


def summed(stage: Stage, rows: Rows) -> Moved:
    """Of a shard's column (`exact_gram.py`, combine): every slice, and the sum, which each part but
    the first reads and writes once more, and its copy."""
    each, counts = stage.layout.gradient_bytes, rows.of(stage.layout)
    slices = rows.slots * counts.groups + counts.targets * counts.halves
    parts = memory.parts(stage, rows)
    again = 8 * parts + (8 * slices if each < 4 else 0)
    return Moved((slices + 1) * each + again, (slices + 1) * each)


def sketched(stage: Stage, rows: Rows) -> Moved:
    """Of an element of every local buffer."""
    local = rows.slots + rows.of(stage.layout).targets
    return Moved(sketch_bytes(local), stage.layout.gradient_bytes * local)


def sketch_bytes(local: int) -> float:
    """Of an element of L buffers (`projection/sketch.py`): its number, 8 bytes; its hash, 268, of
    which a finaliser is 100; sign and bucket, 36; and of each buffer 24 with its signed copy."""
    return 312 + 24 * local


def combined(stage: Stage, rows: Rows) -> Moved:
    """Of an element (`buffers.py`, combine_): the first buffer in place, then one after another."""
    local, each = rows.slots + rows.of(stage.layout).targets, stage.layout.gradient_bytes
    return Moved((2 + 3 * (local - 1)) * each, (local + 1) * each)
