"""Every rank gets its shard of every row, for rows and optimizer instances of any size."""

import pytest

from megatron_dr.mcore.buffer_rows.route import Plan, plan

Shard = set[tuple[int, int]]  # (rank, number of the shard): summed


def followed(plans: list[Plan]) -> list[list[Shard]]:
    """What each rank has in the end, where the collectives do what they say."""
    held: list[list[Shard]] = [
        [{(rank, shard)} for shard in one.order] for rank, one in enumerate(plans)
    ]
    for step in range(2):
        groups = [one.inner[step] for one in plans]
        assert all(groups[other] == group for group in groups for other in group)
        each = [len(shards) // len(group) for shards, group in zip(held, groups, strict=True)]
        held = [
            [
                set().union(*(held[other][group.index(rank) * n + k] for other in group))
                for k in range(n)
            ]
            for rank, (group, n) in enumerate(zip(groups, each, strict=True))
        ]
    across = [one.across for one in plans]
    assert all(across[other] == group for group in across for other in group)
    return [
        [held[other][group.index(rank)] for other in group] for rank, group in enumerate(across)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 16, 24])
def test_every_rank_gets_its_shard_of_every_row(ranks: int) -> None:
    divisors = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for instance in divisors:
        rows = [[rank // size for rank in range(ranks)] for size in divisors]
        halves = [[row % 2 for row in some] for some in rows if (some[-1] + 1) % 2 == 0]
        for keys in rows + halves:
            plans = [plan(list(range(ranks)), keys, instance, rank) for rank in range(ranks)]
            assert sorted(one.place for one in plans) == list(range(ranks))
            for rank, found in enumerate(followed(plans)):
                place = plans[rank].place
                assert place // (ranks // instance) == rank % instance  # the optimizer's shard
                assert found == [
                    {(other, place) for other in range(ranks) if keys[other] == key}
                    for key in sorted(set(keys))
                ]


def test_no_copy_where_an_instance_is_a_row() -> None:
    """Shards then lie in the order in which they are sent, and only parts cross."""
    found = plan(list(range(8)), [0, 0, 0, 0, 1, 1, 1, 1], 4, 5)
    assert found == Plan(3, [[4, 5, 6, 7], [5]], [1, 5], list(range(8)))
    whole = plan(list(range(8)), [0] * 8, 4, 5)
    assert whole == Plan(3, [[4, 5, 6, 7], [1, 5]], [5], list(range(8)))
