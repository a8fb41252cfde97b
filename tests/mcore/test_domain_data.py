"""Domain rows' data: through Megatron's own sampler, a microbatch holds samples of one corpus."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.training.datasets.data_samplers import (
    MegatronPretrainingSampler,
    build_pretraining_data_loader,
)

from megatron_dr.data.domains import DomainPlan, domains_of_step
from megatron_dr.mcore import compat, errors
from megatron_dr.mcore.data import datasets, domain_blend, domains

from ._datasets import LENGTH, ONE, SAMPLES, arguments, indexed, jsonl, on_ranks, text

WEIGHTS, SIZES, PER_STEP = (3, 2, 1), (11, 7, 4), 4


class Named:
    """Samples that say their domain and their number."""

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def __len__(self) -> int:
        return SIZES[self.domain]

    def __getitem__(self, number: int) -> tuple[int, int]:
        assert 0 <= number < len(self)
        return self.domain, number


def read(ranks: int, peers: int, micro: int, consumed: int) -> list[list[list[Any]]]:
    """What Megatron's sampler gives: [rank][microbatch] -> samples of three steps."""
    size = 3 * PER_STEP * ranks * micro
    named = [Named(d) for d in range(len(WEIGHTS))]
    blend = domain_blend.DomainBlend(named, DomainPlan(WEIGHTS), peers * micro, size)
    samplers = [MegatronPretrainingSampler(len(blend), consumed, micro, r, ranks)
                for r in range(ranks)]  # fmt: skip
    return [[[blend[i] for i in numbers] for numbers in sampler] for sampler in samplers]


layouts = pytest.mark.parametrize(
    "ranks, peers, micro",
    [(d, p, u) for d in (1, 2, 4) for p in (1, 2) for u in (1, 3) if d % p == 0],
)


@layouts
def test_microbatches_are_of_the_domain_that_all_ranks_know(
    ranks: int, peers: int, micro: int
) -> None:
    plan = DomainPlan(WEIGHTS)
    for rank, microbatches in enumerate(read(ranks, peers, micro, 0)):
        assert [len(samples) for samples in microbatches] == [micro] * 3 * PER_STEP
        for step in range(3):
            first = step * PER_STEP
            known = domains_of_step(plan, first, PER_STEP, rank, ranks, peers)
            for samples, domain in zip(microbatches[first:], known, strict=False):
                assert {d for d, _ in samples} == {domain}


@layouts
def test_a_domains_samples_are_taken_once_before_any_repeats(
    ranks: int, peers: int, micro: int
) -> None:
    taken = [Counter[int](dict.fromkeys(range(size), 0)) for size in SIZES]
    for together in zip(*read(ranks, peers, micro, 0), strict=True):
        for domain, number in (sample for samples in together for sample in samples):
            taken[domain][number] += 1
        assert all(max(t.values()) - min(t.values()) <= 1 for t in taken)
    assert sum(t.total() for t in taken) == 3 * PER_STEP * ranks * micro


@layouts
@pytest.mark.parametrize("done", [PER_STEP, 2 * PER_STEP])
def test_resuming_goes_on(ranks: int, peers: int, micro: int, done: int) -> None:
    whole = read(ranks, peers, micro, 0)
    assert read(ranks, peers, micro, done * ranks * micro) == [w[done:] for w in whole]


def by_domain(args: Any, numbers: list[int]) -> tuple[Any, Any, Any]:
    """The general data as a run with domain rows has them."""
    part = domain_blend.DomainPart()
    part.refuse(args)
    part.settle(True, args)
    part.resume(True, args, args)
    train, valid, test = datasets.general_datasets(args, numbers, None)
    return part.on_data(args, train), valid, test


def loaded(
    tp: int, flags: list[str], ep: int, steps: int, consumed: int = 0, cp: int = 1
) -> tuple[int, list[list[list[int]]], list[int]]:
    """P; this rank's tokens [microbatch, sample, token] by Megatron's loader; known domains."""
    parallel_state.initialize_model_parallel(
        tp, context_parallel_size=cp, expert_model_parallel_size=ep
    )
    args = arguments(*flags, tp=tp)
    args.dr_rows, args.num_workers, args.consumed_train_samples = "domain", 0, consumed
    together = args.micro_batch_size * args.data_parallel_size
    train: Any = None
    with errors.refused():  # as in adaptor.datasets_provider
        train, _, _ = by_domain(args, [steps * together, 0, 0])
    peers = compat.data_ranks_per_row()
    rank, ranks = parallel_state.get_data_parallel_rank(), args.data_parallel_size
    plan = DomainPlan(domains.domain_weights(args))
    first = consumed // together
    known = domains_of_step(plan, first, steps - first, rank, ranks, peers)
    loader = build_pretraining_data_loader(train, consumed)
    return peers, [batch["tokens"].tolist() for batch in loader or ()][: steps - first], known


def texts(microbatches: list[list[list[int]]]) -> list[list[str]]:
    return [[text({"tokens": torch.tensor(t)}) for t in tokens] for tokens in microbatches]


@pytest.mark.parametrize("ranks, ep", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_jsonl_corpora_on_ranks(tmp_path: Path, ranks: int, ep: int) -> None:
    flags = [*ONE, "3", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b")]
    seen, steps = Counter[str](), 40 // ranks
    for peers, microbatches, known in on_ranks(ranks, loaded, flags, ep, steps):
        assert peers == ep
        given = texts(microbatches)
        assert [{t.split()[0] for t in m} for m in given] == [{"ab"[d]} for d in known]
        seen.update(t for m in given for t in m)
    assert seen == {f"a {n}": 3 for n in range(SAMPLES)} | {f"b {n}": 1 for n in range(SAMPLES)}


def test_packs_are_of_one_corpus(tmp_path: Path) -> None:
    flags = [*ONE, "3", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b"), "--dr-pack"]
    seen = Counter[str]()
    for _, microbatches, known in on_ranks(2, loaded, flags, 1, 8):  # 5 samples in a pack
        packs = [bytes(t for t in m[0] if t < 256).decode() for m in microbatches]
        assert [set(re.findall("[ab]", p)) for p in packs] == [{"ab"[d]} for d in known]
        seen.update(x for p in packs for x in re.findall("..[0-9]", p))
    assert seen == {f"a {n}": 6 for n in range(SAMPLES)} | {f"b {n}": 2 for n in range(SAMPLES)}


def test_jsonl_corpora_beyond_their_share_go_on_with_new_samples(tmp_path: Path) -> None:
    """Two units of 5 samples, one of each corpus; Megatron makes room for 4 of b."""
    a, b = jsonl(tmp_path, "a"), jsonl(tmp_path, "b")
    flags = [*ONE, "74", a, "26", b, "--micro-batch-size", "5"]
    ((_, microbatches, known),) = on_ranks(1, loaded, flags, 1, 2)
    assert known == [0, 1] and [len(set(m)) for m in texts(microbatches)] == [5, 5]


def test_resumed_ranks_read_on(tmp_path: Path) -> None:
    flags = [*ONE, "3", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b"), "--micro-batch-size", "3"]
    whole = on_ranks(2, loaded, flags, 1, 9)
    resumed = on_ranks(2, loaded, flags, 1, 9, 4 * 3 * 2)
    assert [(r[1], r[2]) for r in resumed] == [(w[1][4:], w[2][4:]) for w in whole]


def test_indexed_corpora(tmp_path: Path) -> None:
    second = 1000
    paths = [indexed(tmp_path, 30, "a"), indexed(tmp_path, 30, "b", second)]
    flags = [*ONE, "1", paths[0], "3", paths[1], "--micro-batch-size", "2"]
    flags += "--tokenizer-type NullTokenizer --vocab-size 2000".split()
    ((_, microbatches, known),) = on_ranks(1, loaded, flags, 1, 12)
    assert Counter(known) == {0: 3, 1: 9}
    of_second = [{t >= second for row in m for t in row} for m in microbatches]
    assert of_second == [{d == 1} for d in known]
    tokens = [t for m in microbatches for row in m for t in row]
    assert len(set(tokens)) == len(tokens) == 24 * LENGTH


def test_tensor_parallel_peers_know_the_domains_and_read_nothing(tmp_path: Path) -> None:
    flags = [*ONE, "1", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b")]
    one, other = on_ranks(2, loaded, flags, 1, 4, tp=2)
    assert len(one[1]) == 4 and other[1] == [] and one[2] == other[2] == [0, 1, 0, 1]


def test_context_parallel_ranks_read_the_same(tmp_path: Path) -> None:
    flags = [*ONE, "1", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b")]
    flags += ["--context-parallel-size", "2"]
    one, other = on_ranks(2, loaded, flags, 1, 4, 0, 2)
    assert one == other and one[0] == 1 and one[2] == [0, 1, 0, 1]


def test_validation_is_blended_as_megatron_blends(tmp_path: Path) -> None:
    paths = ["1", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b")]

    def built(tp: int) -> list[bool]:
        args = arguments("--split", "50,50,0", "--data-path", *paths)
        args.dr_rows = "domain"
        train, valid, test = by_domain(args, [8, 8, 0])
        assert isinstance(train, domain_blend.DomainBlend) and len(train) == 8
        assert isinstance(valid, BlendedDataset) and test is None
        args.dr_rows = "slot"
        other, _, _ = datasets.general_datasets(args, [8, 8, 0], None)
        return [isinstance(other, BlendedDataset)]

    assert on_ranks(1, built) == [[True]]


def test_names_and_weights(tmp_path: Path) -> None:
    a, b, held = (jsonl(tmp_path, name) for name in ("a", "b", "held"))
    (tmp_path / "deep.er").mkdir()
    c = indexed(tmp_path / "deep.er", 2, "c_text.v2")
    cases = {
        (*ONE, "30", b, "70.5", a): (("b", "a"), (30.0, 70.5)),
        ("--train-data-path", "1", a, "2", b, "--valid-data-path", held): (("a", "b"), (1.0, 2.0)),
        (*ONE, "1", c, "1", a): (("c_text.v2", "a"), (1.0, 1.0)),
    }

    def asked(tp: int) -> list[Any]:
        said = []
        for flags in cases:
            args = arguments(*flags)
            said.append((domains.domain_names(args), domains.domain_weights(args)))
        return said

    assert on_ranks(1, asked) == [[*cases.values()]]


def test_what_domain_rows_refuse(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    a, b, again = jsonl(tmp_path, "a"), jsonl(tmp_path, "b"), jsonl(tmp_path / "other", "a")
    two = (*ONE, "1", a, "1", b)
    few = "--dr-rows domain needs at least two corpora"
    cases = {
        ("--mock-data",): few,
        (*ONE, a): few,
        (*ONE, "1", a): few,
        ("--valid-data-path", "1", a, "1", b): few,
        (*ONE, a, b): f"--dr-rows domain needs a weight before each path, since not all ranks read "
        f"the data: say 1 {a} 1 {b} for",
        (*ONE, "1", a, "1", again): f"--dr-rows domain knows corpora by name, but {a} and {again} "
        "are both named a: rename one.",
        (*ONE, "1", a, "0", b): "the weights of domains must be positive numbers, not 1.0 0.0.",
        (*two, "--dataloader-type", "cyclic"): "--dr-rows domain needs samples in order",
        (*two, "--phase-transition-iterations", "2"): "--dr-rows domain counts microbatches over",
        (*two, "--micro-batch-size", "2"): "--dr-rows domain can't resume after 3 samples, not a "
        "multiple of --micro-batch-size x data-parallel size = 2: ",
    }

    def refused(tp: int) -> list[str]:
        said = []
        for flags in cases:
            args = arguments(*flags)
            args.dr_rows, args.consumed_train_samples = "domain", 3
            with pytest.raises(ValueError) as error:
                by_domain(args, [4, 0, 0])
            said.append(str(error.value))
        args = arguments(*two)
        args.consumed_train_samples = 3
        by_domain(args, [4, 0, 0])
        return said

    (said,) = on_ranks(1, refused)
    for message, expected in zip(said, cases.values(), strict=True):
        assert message.startswith(expected)
