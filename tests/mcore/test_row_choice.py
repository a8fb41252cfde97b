"""How many ranks make a row, and how many slots a rank has, where neither is said."""

import pytest

from megatron_dr.mcore.buffer_rows.row_choice import choose
from megatron_dr.plan.rows import near_a_node


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
