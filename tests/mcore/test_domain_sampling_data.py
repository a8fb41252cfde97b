"""What --dr-domain-sampling reads, through Megatron's own sampler and loader; what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

from megatron_dr.data.domain_segments import Segments
from megatron_dr.data.domain_shares import between
from megatron_dr.data.domains import domains_of_step
from megatron_dr.mcore.data import datasets, domain_blend, domain_sampling
from megatron_dr.mcore.data.domain_sampling import STATE, Sampling, SamplingPart

from ._datasets import ONE, arguments, indexed, jsonl, on_ranks

UNITS, SEGMENT = 40, 8


class Named:
    """Samples that say their domain and number."""

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, number: int) -> tuple[int, int]:
        return self.domain, number


def shares(turn: int) -> tuple[int, ...]:
    given = Segments((1, 1), 0, 1).given
    return between([0.1, 0.9] if turn % 3 else [0.8, 0.2], given, 0.2, 2.0)


def read(ranks: int, peers: int, micro: int, workers: int) -> list[tuple[int, int]]:
    """Samples as the ranks get them, one microbatch after the other; of each rank's microbatches
    the domain that it is told is the one that it reads."""
    plan = Segments((1, 1), 0, SEGMENT)
    blend = domain_blend.DomainBlend([Named(0), Named(1)], plan, peers * micro, UNITS * micro)
    loaders = [
        iter(torch.utils.data.DataLoader(
            blend, batch_sampler=MegatronPretrainingSampler(len(blend), 0, micro, r, ranks),
            num_workers=workers, collate_fn=list,
        ))
        for r in range(ranks)
    ]  # fmt: skip
    seen, groups, turn = [], ranks // peers, 0
    for microbatch in range(UNITS // ranks):
        while microbatch * groups >= plan.last.start:
            turn += 1
            plan.add(SEGMENT, shares(turn))
        for rank, loader in enumerate(loaders):
            (known,) = domains_of_step(plan, microbatch, 1, rank, ranks, peers)
            samples = next(loader)
            assert [domain for domain, _ in samples] == [known] * micro
            seen += samples
    return seen


@pytest.mark.parametrize("ranks, peers, micro, workers", [(2, 1, 1, 0), (4, 1, 1, 1), (2, 1, 1, 2)])
def test_every_layout_and_number_of_workers_reads_the_same(
    ranks: int, peers: int, micro: int, workers: int
) -> None:
    seen = read(ranks, peers, micro, workers)
    assert seen == read(1, 1, 1, 0)
    first = [number for domain, number in seen if domain == 0]
    assert first == [*range(len(first))] and len(first) < UNITS / 2


def test_rows_of_several_ranks_read_one_domain_at_a_time() -> None:
    seen = read(4, 2, 3, 0)
    assert sorted(set(seen)) == sorted(seen)


def enlarged(tp: int, paths: list[str], own: str) -> list[int]:
    """Sequences that are laid out of each corpus for 30 of the blend."""
    text = "--tokenizer-type NullTokenizer --vocab-size 4000".split()
    args = arguments(*ONE, "1", paths[0], "2", paths[1], *text)
    args.dr_rows, args.dr_domain_sampling = "domain", own

    def provider(numbers: list[int]) -> Any:
        return datasets.general_datasets(args, numbers, None)

    train, _, _ = domain_sampling.with_room(args, provider)([30, 0, 0])
    return [len(dataset) for dataset in train.datasets]


def test_running_text_has_room_for_the_upper_bound(tmp_path: Path) -> None:
    paths = [indexed(tmp_path, 6, "a"), indexed(tmp_path, 6, "b", 1000)]

    def both(tp: int) -> list[list[int]]:
        return [enlarged(tp, paths, own) for own in ("1,1", "2", "9")]

    ((plain, twice, whole),) = on_ranks(1, both)
    assert plain[0] >= 10 and plain[1] >= 20
    assert twice[0] >= 20 and twice[1] >= 40 and sum(twice) < 85
    assert whole[0] >= 30 and sum(whole) < 110  # no corpus has more than all of it


def test_what_sampling_refuses(tmp_path: Path) -> None:
    blend = (*ONE, "1", jsonl(tmp_path, "a"), "3", jsonl(tmp_path, "b"))
    other = (*ONE, "1", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "c"))
    at_start: dict[tuple[str, str, str | None], str] = {
        (
            "slot",
            "4",
            None,
        ): "--dr-domain-sampling reads corpora by the weights of their rows: give",
        ("domain", "4", "mean"): "and --dr-set mean weighs none: give another set, or drop it.",
        (
            "domain",
            "2,4",
            None,
        ): "the domains' sampling must be LOW,HIGH with 0 <= LOW <= 1 <= HIGH",
        ("domain", "0.1,much", None): "or HIGH alone, not 0.1,much.",
    }

    def refused(tp: int) -> list[str]:
        said, part, args = [], SamplingPart(), arguments(*blend, "--num-workers", "7")
        for args.dr_rows, args.dr_domain_sampling, args.dr_set in at_start:
            with pytest.raises(ValueError) as error:
                part.of(args)
                part.refuse(args)
            said.append(str(error.value))
        args.dr_rows, args.dr_domain_sampling, args.dr_set = "domain", "4", None
        args.dr_domain_interval = 13
        with pytest.raises(ValueError) as error:
            part.settle(part.of(args), args)
        said.append(str(error.value))
        args.num_workers = 6
        part.settle(part.of(args), args)
        sampling = Sampling(args, part.of(args), torch.device("cpu"))
        sampling.save()
        kept = getattr(args, STATE)
        args.num_workers = 7
        for given in (args, arguments(*other)):
            setattr(given, STATE, kept)
            with pytest.raises(ValueError) as error:
                Sampling(given, part.of(args), torch.device("cpu"))
            said.append(str(error.value))
        return said

    (said,) = on_ranks(1, refused)
    expected = [
        *at_start.values(),
        "--num-workers 7 read 14 microbatches beyond a step's 1, but with --dr-domain-interval 13 "
        "the next 13 are decided: give --dr-domain-interval 15, or fewer workers.",
        "--num-workers 7 and a step read 15 samples ahead, but the checkpoint's run decided of the "
        "next 13: resume with fewer workers, or its batch size.",
        "its shares are of the corpora a b, in a blend with other weights or corpora than this",
    ]
    for message, part_of_it in zip(said, expected, strict=True):
        assert part_of_it in message


def test_a_step_that_runs_again_counts_once(tmp_path: Path) -> None:
    blend = (*ONE, "1", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b"), "--global-batch-size", "2")

    def again(tp: int) -> list[list[float]]:
        args, part = arguments(*blend), SamplingPart()
        args.dr_rows, args.dr_domain_sampling, args.dr_domain_interval = "domain", "4", 2
        args.num_workers = 0
        sampling = Sampling(args, part.of(args), torch.device("cpu"))
        weights = {"dr weight a": torch.tensor(1.0), "dr weight b": torch.tensor(-1.0)}
        found = []
        for position in (0, 2, 2, 4):
            args.consumed_train_samples = position
            assert sampling.begin_step(2) == [0, 1]
            sampling.end_step(weights, [])
            found.append(sampling.average_n.tolist())
        sampling.end_step({**weights, "dr bad general": torch.tensor(1.0)}, [])
        assert sampling.average_n.tolist() == found[-1]
        return found

    ((first, second, same, third),) = on_ranks(1, again)
    assert first == [0.75, 0.25] and second == same == [0.875, 0.125]
    assert third == [0.9375, 0.0625]
