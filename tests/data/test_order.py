"""Each sample once per epoch, over all data ranks together; a stream's place is one number."""

from collections import Counter
from itertools import islice

import pytest
import torch

from megatron_dr.data.order import EpochOrder, TargetStream


class Numbered:
    """Samples that say their number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict[str, object]:
        assert 0 <= number < self.size
        return {"tokens": torch.tensor([number]), "dataset_id": 3, "note": "not for the model"}


def streams(samples: int, size: int, micro: int = 1, seed: int = 5) -> list[TargetStream]:
    return [
        TargetStream(Numbered(samples), micro_batch_size=micro, rank=rank, size=size, seed=seed)
        for rank in range(size)
    ]


def take(ranks: list[TargetStream], microbatches: int) -> list[int]:
    """The samples that all ranks see in that many microbatches, in the order of positions."""
    return [
        number
        for _ in range(microbatches)
        for rank in ranks
        for number in next(rank)["tokens"].flatten().tolist()
    ]


def epoch(order: EpochOrder, number: int) -> list[int]:
    n = order.num_samples
    return [order[p] for p in range(number * n, (number + 1) * n)]


@pytest.mark.parametrize("samples", [1, 2, 7, 64])
def test_each_epoch_is_a_permutation(samples: int) -> None:
    order = EpochOrder(samples, 0)
    for number in range(4):
        assert sorted(epoch(order, number)) == list(range(samples))


def test_epochs_and_seeds_differ() -> None:
    seen = {tuple(epoch(EpochOrder(32, seed), e)) for seed in range(4) for e in range(4)}
    assert len(seen) == 16


def test_epoch_depends_on_seed_and_number_alone() -> None:
    assert epoch(EpochOrder(32, 7), 3) == epoch(EpochOrder(32, 7), 3)
    assert epoch(EpochOrder(32, 0), 1) != epoch(EpochOrder(32, 1), 0)


def test_random_access_equals_sequential() -> None:
    sequential = [EpochOrder(13, 3)[p] for p in range(13 * 4)]
    order = EpochOrder(13, 3)
    positions = torch.randperm(13 * 4, generator=torch.Generator().manual_seed(0)).tolist()
    assert {p: order[p] for p in positions} == dict(enumerate(sequential))


@pytest.mark.parametrize("samples", [0, -1])
def test_no_samples_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        EpochOrder(samples, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("samples", [8, 24, 13, 7, 3])
def test_each_sample_once_per_epoch_over_all_ranks(samples: int, micro: int, size: int) -> None:
    epochs = size * micro  # so many epochs are a whole number of microbatches
    seen = take(streams(samples, size, micro), samples * epochs // (size * micro))
    for number in range(epochs):
        assert sorted(seen[number * samples : (number + 1) * samples]) == list(range(samples))


@pytest.mark.parametrize("micro, size", [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4), (4, 2)])
def test_layout_does_not_change_the_order(micro: int, size: int) -> None:
    order = EpochOrder(11, 5)
    assert take(streams(11, size, micro), 40 // (micro * size)) == [order[p] for p in range(40)]


@pytest.mark.parametrize("micro", [1, 2])
def test_place_does_not_depend_on_how_steps_are_cut(micro: int) -> None:
    whole = take(streams(7, 2, micro), 12)
    ranks, cut = streams(7, 2, micro), []
    for microbatches in (1, 4, 2, 5):
        cut += take(ranks, microbatches)
        assert {stream.consumed for stream in ranks} == {len(cut)}
    assert cut == whole


@pytest.mark.parametrize("microbatches", [0, 1, 5, 9])
def test_setting_consumed_resumes(microbatches: int) -> None:
    ranks = streams(7, 2, 2)
    take(ranks, microbatches)
    expected = take(ranks, 6)
    resumed = streams(7, 2, 2)
    for stream in resumed:
        stream.consumed = microbatches * 4
    assert take(resumed, 6) == expected


def test_setting_consumed_goes_back() -> None:
    ranks = streams(7, 2, 2)
    first = take(ranks, 5)
    for stream in ranks:
        stream.consumed = 0
    assert take(ranks, 5) == first


def test_resuming_on_another_number_of_ranks() -> None:
    expected = take(streams(7, 4), 6)[12:]
    resumed = streams(7, 2)
    for stream in resumed:
        stream.consumed = 12
    assert take(resumed, 6) == expected


def test_batch_larger_than_the_set_repeats() -> None:
    (stream,) = streams(3, 1, micro=8)
    numbers = Counter(next(stream)["tokens"].flatten().tolist())
    assert sorted(numbers) == [0, 1, 2] and sorted(numbers.values()) == [2, 3, 3]


def test_batch_is_collated_and_holds_the_models_inputs_alone() -> None:
    (stream,) = streams(5, 1, micro=2)
    assert iter(stream) is stream
    (batch,) = islice(stream, 1)
    assert list(batch) == ["tokens"] and batch["tokens"].shape == (2, 1)
