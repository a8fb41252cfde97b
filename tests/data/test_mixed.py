"""Several target sets in a step's microbatches: their order, and each set's own place."""

from typing import Any

import pytest
import torch

from megatron_dr.data.mixed import MixedStream, order_of
from megatron_dr.data.order import TargetStream


class Numbered:
    """Samples that say who they are."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"tokens": torch.tensor([self.first + number])}

    def origin(self, number: int) -> str:
        return str(self.first + number)


@pytest.mark.parametrize(
    "counts, order",
    [
        ({"a": 1, "b": 2}, "abb"),
        ({"a": 2, "b": 4}, "abbabb"),
        ({"a": 2, "b": 2, "c": 4}, "abccabcc"),
        ({"a": 3}, "aaa"),
        ({"a": 2, "b": 3}, "aabbb"),
    ],
)
def test_order_is_in_equal_rounds(counts: dict[str, int], order: str) -> None:
    assert "".join(order_of(counts)) == order


def stream(rank: int = 0) -> MixedStream:
    own = {"a": TargetStream(Numbered(0, 5), 2, rank, 2, seed=1),
           "b": TargetStream(Numbered(100, 7), 2, rank, 2, seed=1)}  # fmt: skip
    return MixedStream(own, order_of({"a": 1, "b": 2}))


def step(of: MixedStream) -> list[list[int]]:
    return [next(of)["tokens"].flatten().tolist() for _ in range(3)]


def test_each_set_has_its_own_order_and_place() -> None:
    whole, alone = stream(), TargetStream(Numbered(100, 7), 2, 0, 2, seed=1)
    steps = [step(whole) for _ in range(4)]
    of_b = [batch for one in steps for batch in one[1:]]
    assert of_b == [next(alone)["tokens"].flatten().tolist() for _ in range(8)]
    assert all(max(one[0]) < 5 for one in steps)
    assert whole.consumed == {"a": 4 * 4, "b": 4 * 8}
    again = stream()
    again.consumed = {"a": 8, "b": 16}
    assert [step(again) for _ in range(2)] == steps[2:]
    again.consumed = {"b": 16}  # a set that was not there before begins
    assert step(again)[0] == steps[0][0]


def test_a_microbatch_says_where_it_is_from() -> None:
    for rank in (0, 1):
        own = stream(rank)
        step(own)
        place = own.consumed
        found = step(own)
        named = [[int(n) for n in own.origins(place, m)] for m in range(3)]
        assert named == found
