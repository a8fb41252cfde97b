"""Experience: batches, streams that any number of ranks shares, and files."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_dr.rl import experience
from megatron_dr.rl.experience import Experience, ExperienceStream
from megatron_dr.rl.weights import Aggregation


def made(rows: int = 6, length: int = 5, number: int = 4, ppo: bool = False) -> Experience:
    """Row n's completion has n tokens; its tokens tell which row it is."""
    mask = (torch.arange(length) < torch.arange(rows)[:, None]).to(torch.uint8)
    values = torch.randn(5, rows, length, generator=torch.Generator().manual_seed(number))
    tokens = (torch.arange(rows)[:, None] * 10 + torch.arange(length)).to(torch.int32)
    rewards = torch.arange(rows).float()
    advantages = rewards[:, None] - 2
    made = Experience(number, tokens, mask, *values[:2], rewards, advantages, {"reward": 2.5})
    if not ppo:
        return made
    return dataclasses.replace(
        made, advantage_NA=values[2], value_NT=values[3], return_NT=values[4]
    )


def test_a_batch_has_labels_weights_and_counts() -> None:
    batch = made().batch([3, 0], "sequence", plain=True)
    assert batch["labels"][0, :4].tolist() == [31, 32, 33, 34]
    assert batch["weight"][0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    assert batch["loss_mask"].sum() == 1 and not batch["weight"][1].any()
    assert batch["advantage"].tolist() == [[1.0] * 5, [-2.0] * 5] and batch["plain"].all()
    assert "value" not in batch
    assert made().batch([3], "token", False)["loss_mask"].sum() == 3


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_step_is_the_same_for_any_number_of_ranks(size: int) -> None:
    """And a stream that is set back gives the same again."""

    def rows(consumed: int) -> list[int]:
        found = []
        for rank in range(size):
            stream = ExperienceStream(
                micro_batch_size=1, rank=rank, size=size, batch_size=6, aggregation="token",
                plain=False,
            )  # fmt: skip
            stream.show(made(), seed=9)
            stream.consumed = consumed
            found += [int(next(stream)["tokens"][0, 0]) // 10 for _ in range(6 // size)]
        return sorted(found)

    assert rows(0) == rows(6) == list(range(6))
    one = ExperienceStream(
        micro_batch_size=6, rank=0, size=1, batch_size=6, aggregation="token", plain=False
    )
    one.show(made(), seed=9)
    first, second = next(one)["tokens"], next(one)["tokens"]
    assert not torch.equal(first, second)  # epochs have their own order
    one.consumed = 0
    assert torch.equal(next(one)["tokens"], first)


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_a_steps_counts_add_up_to_all_its_tokens(aggregation: Aggregation) -> None:
    """In both steps of an epoch, on both ranks together; means are what they are in any unit."""
    known = made(rows=8, length=7)
    streams = [
        ExperienceStream(
            micro_batch_size=1, rank=rank, size=2, batch_size=4, aggregation=aggregation,
            plain=False,
        )
        for rank in range(2)
    ]  # fmt: skip
    for stream in streams:
        stream.show(known, seed=9)
    for _ in range(3):
        batches = [next(stream) for stream in streams for _ in range(2)]
        rows = [int(batch["tokens"][0, 0]) // 10 for batch in batches]
        plain = [known.batch([row], aggregation, False) for row in rows]
        counted = sum(batch["loss_mask"].sum() for batch in plain)
        assert sum(float(b["loss_mask"].sum()) for b in batches) == pytest.approx(4 * 7)
        for batch, one in zip(batches, plain, strict=True):
            for name in ("weight", "loss_mask"):
                torch.testing.assert_close(batch[name], one[name] * (4 * 7 / counted))


def test_a_step_in_which_nothing_counts_has_no_weights() -> None:
    known = dataclasses.replace(made(), mask_NT=torch.zeros(6, 5, dtype=torch.uint8))
    stream = ExperienceStream(
        micro_batch_size=6, rank=0, size=1, batch_size=6, aggregation="token", plain=False
    )
    stream.show(known, seed=9)
    batch = next(stream)
    assert not batch["weight"].any() and not batch["loss_mask"].any()


def test_rewards_of_the_whole_rollout_are_normalised() -> None:
    found = made().by_reward().advantage_NA
    assert found.mean() == pytest.approx(0, abs=1e-6)
    assert found.std() == pytest.approx(1, rel=1e-3)


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "iter_1.safetensors"
    saved = {"general": made(ppo=True), "target": made(3, number=1)}
    experience.save(path, saved, {"kl_weight": 0.3})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    found, state = experience.load(path)
    assert state == {"kl_weight": 0.3}
    assert found.keys() == saved.keys()
    for role in saved:
        for field in dataclasses.fields(Experience):
            got, want = getattr(found[role], field.name), getattr(saved[role], field.name)
            assert torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


def test_values_travel_with_their_tokens_and_a_target_learns_none() -> None:
    known = made(ppo=True)
    batch = known.batch([4, 1], "token", plain=False)
    assert known.value_NT is not None and known.return_NT is not None
    for name, of_all in (("advantage", known.advantage_NA), ("value", known.value_NT),
                         ("return", known.return_NT)):  # fmt: skip
        assert torch.equal(batch[name], of_all[[4, 1]])
    target = known.by_reward().without_returns().batch([4, 1], "token", plain=True)
    assert target["return"].isnan().all() and torch.equal(target["value"], batch["value"])


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "iter_1.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="iter_1.safetensors: the checkpoint's rollout can't"):
        experience.load(path)
