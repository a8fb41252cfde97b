"""What a step needs of the host is on the device before, or is made there."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import constants

from . import _megatron, _oracle
from ._data import Layout
from ._ranks import run_ranks

CPU = torch.device("cpu")


def test_an_index_is_copied_once() -> None:
    assert constants.index([2, 0], CPU) is constants.index((2, 0), CPU)
    assert constants.index([2, 0], CPU).tolist() == [2, 0]
    assert constants.scalar(0.5, CPU).item() == 0.5


class Copies(TorchDispatchMode):
    """Counts tensors that are made of lists on the host: on a GPU each is a copy that waits. Of
    scalars it can't be told here; assigning one fills memory on the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.lift_fresh.default and args[0].dim() > 0
        return func(*args, **(kwargs or {}))


def copied(layout: Layout, initial: Any, dr: DRConfig) -> list[int]:
    """In each step between the last microbatch's end and the gradient's."""
    found: list[int] = []

    def attach(model: Any, optimizer: Any, config: Any) -> Any:
        handle = megatron_dr.attach(model, optimizer, config, dr)
        project = handle.rows._project

        def counting(*args: Any) -> Any:
            with Copies() as copies:
                out = project(*args)
            found.append(copies.count)
            return out

        handle.rows._project = counting
        return handle

    _megatron.train(layout, 3, initial, attach)
    return found


@pytest.mark.parametrize("gram", ["exact", "sketch"])
@pytest.mark.parametrize("auto", [False, True])
def test_a_step_after_the_first_copies_nothing_from_the_host(gram: Any, auto: bool) -> None:
    layout = Layout(dp=2, distributed_optimizer=True, targets=8)
    dials: dict[str, Any] = {"alpha": 0.1}
    if auto:
        dials = {"alpha_style": "auto", "target_size": 16, "alpha_steps": 4, "keep_general": 0.1}
    dr = DRConfig(gram=gram, slots=layout.slots, sketch_size=64 if gram == "sketch" else None,
                  **dials)  # fmt: skip
    for counts in run_ranks(2, copied, layout, _oracle.initial(layout), dr):
        assert counts[1:] == [0, 0]
