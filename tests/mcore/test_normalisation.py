"""Each role's gradient is divided by its own microbatches, whatever Megatron divides by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_dr.mcore.buffer_rows import normalisation
from megatron_dr.mcore.buffer_rows.row_map import RowMap


def factors(num_target: int, num_general: int, row_map: RowMap) -> tuple[float, float]:
    router: Any = SimpleNamespace(num_target=num_target, num_general=num_general)
    ratio, scale, share = normalisation.factors(router, row_map, False, torch.device("cpu"))
    assert ratio.dtype == torch.float64 and share is None
    return float(ratio), float(scale)


@pytest.mark.parametrize("num_target, num_general", [(1, 1), (2, 6), (5, 3)])
def test_ranks_that_run_both_roles(num_target: int, num_general: int) -> None:
    """The schedule divided each loss by all microbatches of the rank."""
    ratio, scale = factors(num_target, num_general, RowMap(3, num_general))
    divided_by = num_target + num_general
    assert scale / divided_by == pytest.approx(1 / num_general)
    assert ratio * scale / divided_by == pytest.approx(1 / num_target)


def test_without_a_target_nothing_is_undone() -> None:
    assert factors(0, 4, RowMap(2, 4)) == (0.0, 1.0)


@pytest.mark.parametrize("groups, target_groups", [(2, 1), (4, 1), (5, 3)])
def test_ranks_of_one_role(groups: int, target_groups: int) -> None:
    """Megatron divides the sum over row groups by all of them."""
    ratio, scale = factors(0, 2, RowMap(groups, 1, target_groups, ranks=2))
    assert scale / groups == pytest.approx(1 / (groups - target_groups))
    assert ratio * scale / groups == pytest.approx(1 / target_groups)
