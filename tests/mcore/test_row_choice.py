"""How many ranks make a row, and how many slots a rank has, where neither is said."""

import os

import pytest
import torch.distributed as dist

from megatron_dr.mcore.buffer_rows import levels, row_groups
from megatron_dr.plan.choice import choose
from megatron_dr.plan.rows import near_a_node

from . import _megatron
from ._data import Layout
from ._ranks import run_ranks


@pytest.mark.parametrize(
    "ranks, least, node, size",
    [
        (4, 1, 4, 1),  # few: each rank is a row
        (8, 1, 8, 1),
        (16, 1, 8, 2),  # a node would leave 2 rows
        (64, 1, 8, 8),  # a node is a row
        (64, 2, 8, 8),
        (64, 16, 8, 16),  # its ranks share sequences: fewer than 8 rows can't be helped
        (1024, 1, 1, 8),  # one data rank of each node: 128 rows at most
        (4096, 1, 8, 32),
        (24, 1, 8, 3),
    ],
)
def test_rows_near_a_node(ranks: int, least: int, node: int, size: int) -> None:
    assert near_a_node(ranks, least, node) == size
    assert ranks % size == 0 and size % least == 0


def test_rows_that_can_t_be() -> None:
    with pytest.raises(ValueError, match="the 16 ranks that share .* divide the 8 data x context"):
        near_a_node(8, 16, 8)


@pytest.mark.parametrize(
    "ranks, least, instance, size",
    [
        (64, 1, 8, 8),  # an instance is a row
        (16, 1, 8, 2),  # two instances would be two rows
        (24, 1, 12, 3),
        (24, 1, 8, 2),  # 3 would lie in two instances
        (4, 1, 2, 1),
        (12, 4, 6, 12),  # 4 ranks that share a sequence would lie in two instances
        (2048, 1, 8, 16),  # two instances are a row: 128 rows at most
    ],
)
def test_rows_near_an_instance(ranks: int, least: int, instance: int, size: int) -> None:
    assert near_a_node(ranks, least, instance, instance) == size


def of_uneven_nodes() -> tuple[int, int]:
    """What this rank counts on its node of 3 or of 1, as torchrun would say, and what counts."""
    rank = dist.get_rank()
    os.environ["LOCAL_WORLD_SIZE"] = "3" if rank < 3 else "1"
    _megatron.initialize(Layout(dp=4))
    here = sum(levels.node_of(other) == levels.node_of(rank) for other in range(4))
    return here, row_groups._data_ranks_of_a_node()


def test_the_smallest_of_uneven_nodes_counts_on_all_ranks() -> None:
    found = run_ranks(4, of_uneven_nodes)
    assert [here for here, _ in found] == [3, 3, 3, 1]
    assert {least for _, least in found} == {1}


@pytest.mark.parametrize(
    "groups, microbatches, fit, slots, why",
    [
        (8, 16, 99, 1, "at least 8"),
        (2, 8, 99, 8, "up to 16 rows"),
        (2, 12, 99, 6, "up to 16 rows"),
        (1, 64, 99, 16, "up to 16 rows"),
        (2, 8, 3, 2, "memory allows no more"),
        (2, 8, 1, 1, "memory allows no more"),
        (2, 3, 99, 3, "make no more"),
        (2, None, 99, 1, "not known"),
    ],
)
def test_slots(groups: int, microbatches: int | None, fit: int, slots: int, why: str) -> None:
    found, said = choose(groups, microbatches, fit)
    assert found == slots and why in said
