"""Packs: each sample once per epoch, one order for all, and samples that keep to themselves."""

import itertools

import numpy as np
import pytest
import torch

from megatron_dr.data.order import TargetStream
from megatron_dr.data.packing import PackedSamples, PackOrder, Padded, first_fit, pack, padded
from megatron_dr.data.sample import Part

LENGTH, PAD = 16, 99


class Numbered(Padded):
    """Sample n has tokens 100 n, 100 n + 1, ..., the first half of them without a loss."""

    sequence_length, pad, attention_mask = LENGTH, PAD, False

    def __init__(self, sizes: list[int]) -> None:
        self.sizes, self.lengths = sizes, np.minimum(sizes, LENGTH + 1)

    def part(self, number: int) -> Part:
        size = min(self.sizes[number], LENGTH + 1)
        return Part.of(100 * number + np.arange(size), np.arange(size) >= size // 2)


class EndsWithin(Padded):
    """One sample: two texts, each ended by the token that pads."""

    sequence_length, pad, attention_mask = 6, PAD, False
    lengths = np.array([5])

    def part(self, number: int) -> Part:
        return Part.of([1, 2, PAD, 3, PAD], [1] * 5)


def test_no_loss_after_the_end_of_a_text() -> None:
    """As Megatron's --eod-mask-loss in running text: what follows that token is not learnt."""
    samples = EndsWithin()
    packs, place = PackedSamples(samples, seed=1), np.array([0])
    for eod_mask, expected in ((False, [1, 1, 1, 1, 0, 0]), (True, [1, 1, 0, 1, 0, 0])):
        samples.eod_mask = eod_mask
        assert samples[0]["loss_mask"].tolist() == packs[place]["loss_mask"].tolist() == expected


def sizes(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, LENGTH + 5, count).tolist()


@pytest.mark.parametrize("count", [1, 2, 30, 300])
def test_first_fit_places_every_length_once_in_room_for_it(count: int) -> None:
    lengths = [min(s, LENGTH) for s in sizes(count)]
    packs = first_fit(lengths, LENGTH)
    assert sorted(itertools.chain(*packs)) == list(range(count))
    assert all(sum(lengths[n] for n in p) <= LENGTH for p in packs)
    if count == 300:  # far fewer than one each
        assert len(packs) < 1.2 * sum(lengths) / LENGTH


@pytest.mark.parametrize("count", [1, 7, 40])
def test_every_epoch_has_each_sample_once_in_an_order_of_its_own(count: int) -> None:
    order = PackOrder(np.array(sizes(count)), LENGTH, seed=3)
    epochs, position = [], 0
    for epoch in range(3):
        n = order.packs(epoch)
        epochs.append([n for p in range(position, position + n) for n in order[p].tolist()])
        position += n
    assert all(sorted(e) == list(range(count)) for e in epochs)
    assert count == 1 or epochs[0] != epochs[1]


def test_a_place_in_the_order_needs_no_history() -> None:
    lengths = np.array(sizes(40))
    first = PackOrder(lengths, LENGTH, seed=3)
    whole = [first[p].tolist() for p in range(90)]
    assert PackOrder(lengths, LENGTH, seed=3)[70].tolist() == whole[70]
    assert first[5].tolist() == whole[5]  # and back


def segments(made: dict[str, torch.Tensor]) -> list[slice]:
    ends = torch.unique_consecutive(made["cu_seqlens"]).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def test_a_pack_is_its_samples_side_by_side() -> None:
    samples = Numbered([6, 1, 8])
    parts = [samples.part(n) for n in range(3)]
    made = pack(parts, LENGTH, PAD)
    found = segments(made)
    assert [s.stop - s.start for s in found] == [5, 1, 7, 3] and made["num_packed"] == 3
    assert made["max_seqlen"] == 7 and len(made["cu_seqlens"]) == LENGTH + 1
    for part, where in zip(parts, found, strict=False):
        alone = padded(part, where.stop - where.start, PAD)
        for name, value in alone.items():
            assert made[name][where].tolist() == value.tolist()
    assert made["loss_mask"][found[-1]].sum() == 0
    assert made["labels"][found[0]].tolist() == [1, 2, 3, 4, 5]
    assert made["loss_mask"][found[0]].tolist() == [0, 0, 1, 1, 1]  # tokens 3, 4, 5


def test_a_full_pack_has_no_padding() -> None:
    made = pack([Numbered([17]).part(0)], LENGTH, PAD)
    assert [s.stop - s.start for s in segments(made)] == [LENGTH]
    with pytest.raises(ValueError, match="32 inputs don't fit into a pack of 16"):
        pack([Numbered([17]).part(0)] * 2, LENGTH, PAD)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_target_packs_do_not_depend_on_the_ranks_and_resume(ranks: int) -> None:
    def take(consumed: int, microbatches: int) -> list[list[int]]:
        out: list[list[int]] = []
        streams = [
            TargetStream(PackedSamples(Numbered(sizes(20)), 5), micro_batch_size=1, rank=r,
                         size=ranks, seed=5)
            for r in range(ranks)
        ]  # fmt: skip
        for stream in streams:
            stream.consumed = consumed
        for _ in range(microbatches):
            out += [next(s)["tokens"].flatten().tolist() for s in streams]
        return out

    samples = PackedSamples(Numbered(sizes(20)), 5)
    expected = [samples[samples.order[p]]["tokens"].tolist() for p in range(24)]
    assert take(0, 24 // ranks) == expected
    assert take(8, 16 // ranks) == expected[8:]
