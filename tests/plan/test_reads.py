"""What the plan says of memory that is read and written is what torch's operations do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dr.plan import choice, reads
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.choice import Wanted
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows
from megatron_dr.projection import CountSketch, gram_of_long

N = 1 << 16


class Counted(TorchDispatchMode):
    """Bytes of what operations read and write; views move nothing, and a matrix that is multiplied
    by itself is read once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        returned = function._schema.returns[0].alias_info
        if returned is not None and not returned.is_write:
            return out
        read = {
            (a.data_ptr(), a.numel()): a.nbytes for a in tree_leaves(args) if torch.is_tensor(a)
        }
        self.bytes += sum(read.values()) + out.nbytes
        self.operations += 1
        return out


def moved(work: Callable[[], object]) -> Counted:
    with Counted() as counted:
        work()
    return counted


def test_sketches() -> None:
    """But for the sketches themselves, which are small."""
    for local in (1, 2, 5):
        out, rows = torch.zeros(local, 2), [torch.ones(N) for _ in range(local)]
        found = moved(lambda o=out, r=rows: CountSketch(2, 0).add_(o, r, torch.arange(N), 7))
        assert found.bytes / N == pytest.approx(reads.sketch_bytes(local), rel=1e-3)
        assert found.operations == 33 + 2 * local


LAYOUTS = {"a target": Rows(), "target ranks": Rows(target_ranks=1), "slots": Rows(slots=2)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_products(name: str) -> None:
    rows, layout = LAYOUTS[name], Layout(dp=4)
    (stage,) = stages(Model(1, 64, 1, 1, 64, 128), layout)
    counts = rows.of(layout)
    parts = [torch.ones(counts.groups, N) for _ in range(rows.slots)]
    parts += [torch.ones(1, N) for _ in range(counts.targets)]
    found = moved(lambda: gram_of_long(parts))
    assert found.bytes / N == pytest.approx(reads.products(stage, rows).now, rel=0.03)


def test_sketches_are_taken_where_they_win_by_more_than_it_takes_to_make_them() -> None:
    model = Model(80, 8192, 64, 8, 28672, 128256)
    pipeline = Layout(dp=8, tp=8, pp=4, sequence_parallel=True)  # both expose a whole bucket
    alone = Layout(dp=8, tp=8, pp=4, sequence_parallel=True, overlap=False)
    chosen = [
        choice.settle(Wanted(Rows(slots=slots), auto=False), stages(model, layout), H100, 8)[0]
        for layout, slots in ((pipeline, 1), (alone, 1), (alone, 4))
    ]
    assert [rows.exact for rows in chosen] == [True, True, False]
