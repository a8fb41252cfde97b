"""Both roles' data, through Megatron's own flags and dataset builder, on real ranks."""

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.loop import forward

from ._datasets import (
    LENGTH,
    ONE,
    SAMPLES,
    arguments,
    general,
    indexed,
    jsonl,
    on_ranks,
    target,
    text,
)


def test_single_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path, "a")

    def seeds(tp: int) -> list[list[str]]:
        first = general(tp, [*ONE, path], [25, 0, 0])
        assert first[1:] == [None, None]
        args = arguments(*ONE, path, "--seed", "5")
        other, _, _ = datasets.general_datasets(args, [25, 0, 0], None)
        return [first[0], [text(other[n]) for n in range(len(other))]]

    ((texts, others),) = on_ranks(1, seeds)
    everything = [f"a {n}" for n in range(SAMPLES)]
    assert len(texts) == len(others) == 25
    for stream in (texts, others):
        assert sorted(stream[:10]) == sorted(stream[10:20]) == everything
        assert stream[:10] != stream[10:20] and stream[:10] != everything
    assert texts != others


def test_blend_takes_the_shares_of_its_weights(tmp_path: Path) -> None:
    paths = ["3", jsonl(tmp_path, "a"), "1", jsonl(tmp_path, "b")]
    ((train_set, _, _),) = on_ranks(1, general, [*ONE, *paths], [40, 0, 0])
    expected = {f"a {n}": 3 for n in range(SAMPLES)} | {f"b {n}": 1 for n in range(SAMPLES)}
    assert Counter(train_set) == expected


def test_split_parts_the_samples(tmp_path: Path) -> None:
    flags = ["--split", "50,30,20", "--data-path", jsonl(tmp_path, "a")]
    (parts,) = on_ranks(1, general, flags, [5, 3, 2])
    assert [len(part) for part in parts] == [5, 3, 2]
    assert sorted(sum(parts, [])) == [f"a {n}" for n in range(SAMPLES)]


OTHERWISE = "is evaluated as the general validation set is, but there is none: give"


@pytest.mark.parametrize(
    "given, test, said",
    [
        ({}, "a test set", f"^a test set {OTHERWISE} --valid-data-path, or --eval-iters 0.$"),
        ({"dr_target_valid_data": "a"}, None, f"^--dr-target-valid-data {OTHERWISE} .* 0.$"),
        ({"dr_target_test_data": "a"}, None, f"^--dr-target-test-data {OTHERWISE} .* drop it.$"),
        ({"full_validation": True, "eval_iters": 0}, None, f"^--full-valida.* {OTHERWISE} .* it.$"),
        ({"eval_iters": 0, "dr_target_valid_data": "a"}, None, None),
        ({}, None, None),
    ],
)
def test_without_a_validation_set(
    given: dict[str, Any], test: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be evaluated with it, or all of it, is refused; else nothing is evaluated."""
    monkeypatch.setattr(datasets.torch.distributed, "all_reduce", lambda *_: None)
    monkeypatch.setattr(datasets.torch.cuda, "current_device", lambda: "cpu")
    args = Namespace(**{"eval_iters": 7, "full_validation": False} | given)
    datasets.settle_validation(args, "a validation set", test)
    assert args.eval_iters == given.get("eval_iters", 7)
    if said is None:
        datasets.settle_validation(args, None, test)
        assert args.eval_iters == 0
    else:
        with pytest.raises(ValueError, match=said):
            datasets.settle_validation(args, None, test)


def test_data_parallel_ranks_build_the_same(tmp_path: Path) -> None:
    one, other = on_ranks(2, general, [*ONE, jsonl(tmp_path, "a")], [25, 0, 0])
    assert one == other and len(one[0]) == 25


def test_tensor_parallel_peers_read_nothing(tmp_path: Path) -> None:
    one, other = on_ranks(2, general, [*ONE, jsonl(tmp_path, "a")], [25, 0, 0], tp=2)
    assert len(one[0]) == 25 and other == [None, None, None]


def test_what_is_refused(tmp_path: Path) -> None:
    good, prefix, missing = jsonl(tmp_path, "a"), indexed(tmp_path), str(tmp_path / "missing")
    (tmp_path / "half.idx").touch()
    half = str(tmp_path / "half")
    none = f"{missing}: no such data; an indexed dataset is named by its path without .bin"
    cases = {
        (*ONE, missing + ".jsonl"): f"{missing}.jsonl: no such file or folder.",
        (*ONE, "1", good, "1", missing + ".jsonl"): f"{missing}.jsonl: no such file or folder.",
        (*ONE, missing): none,
        (*ONE, half): none.replace("missing", "half"),
        (*ONE, prefix + ".bin"): none.replace("missing", "indexed.bin"),
        (*ONE, good, prefix): "the general data mixes samples (files",
        ("--train-data-path", good, "--valid-data-path", prefix): "the general data mixes",
        ("--train-data-path", good, "--valid-data-path", missing): none,
        (*ONE, "1", good, "0", good): f"--data-path: {good} has weight 0, but weights of a blend",
        (*ONE, "nan", good, "1", good): f"--data-path: {good} has weight nan",
        ("--train-data-path", "-1", good): f"--train-data-path: {good} has weight -1",
        (*ONE, good, good, "1", good): "the general data has weights before some paths and not",
        ("--split", "99,1,0", "--data-path", good): f"{good}: no sample is left for valid",
    }

    def refused(tp: int) -> list[str]:
        said = []
        for flags in cases:
            with pytest.raises(ValueError) as error:
                datasets.general_datasets(arguments(*flags), [4, 4, 0], None)
            said.append(str(error.value))
        return said

    (said,) = on_ranks(1, refused)
    for message, expected in zip(said, cases.values(), strict=True):
        assert message.startswith(expected)


def test_wrong_line_on_two_ranks_is_one_sentence(tmp_path: Path) -> None:
    path = jsonl(tmp_path, "bad", "{")
    said = on_ranks(2, general, [*ONE, path], [8, 0, 0])
    assert said[0] == said[1] and said[0].startswith(f"{path}:11: not JSON")


@pytest.mark.parametrize("case", ["blend", "tensor parallel", "no sample left"])
def test_refused_by_one_rank_does_not_hang_the_others(tmp_path: Path, case: str) -> None:
    path, good = jsonl(tmp_path, "bad", "{"), jsonl(tmp_path, "good")
    flags, expected = {
        "blend": ([*ONE, "1", good, "1", path], f"{path}:11: not JSON"),
        "tensor parallel": ([*ONE, path], f"{path}:11: not JSON"),
        "no sample left": (["--split", "99,1,0", "--data-path", good], f"{good}: no sample"),
    }[case]
    tp = 2 if case == "tensor parallel" else 1
    said = on_ranks(2, general, flags, [8, 4, 0], timeout=8, tp=tp)
    assert said[0] == said[1] and said[0].startswith(expected)


def test_empty_split_that_is_not_used(tmp_path: Path) -> None:
    flags = ["--split", "99,1,0", "--data-path", jsonl(tmp_path, "a")]
    (built,) = on_ranks(1, general, flags, [10, 0, 0])
    assert not isinstance(built, str), built
    assert len(built[0]) == 10


def test_no_general_data_is_refused() -> None:
    def refused(tp: int) -> str:
        with pytest.raises(ValueError) as error:
            datasets.general_datasets(arguments(), [4, 0, 0], None)
        return str(error.value)

    (said,) = on_ranks(1, refused)
    assert "--data-path" in said


def test_indexed_target_gives_each_sample_once(tmp_path: Path) -> None:
    prefix = indexed(tmp_path)  # 160 tokens: nine samples of 16 and a next token
    ((*rows,),) = on_ranks(1, target, prefix, [*ONE, jsonl(tmp_path, "a")], 1, 18)
    epochs = rows[:9], rows[9:]
    for epoch in epochs:
        tokens = [token for row in epoch for token in row]
        assert len(set(tokens)) == len(tokens) == 9 * LENGTH
        assert set(tokens) <= set(range(SAMPLES * LENGTH))
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


@pytest.mark.parametrize("tp", [1, 2])
def test_jsonl_target_on_two_ranks(tmp_path: Path, tp: int) -> None:
    path = jsonl(tmp_path, "t")
    ranks = on_ranks(2, target, path, [*ONE, jsonl(tmp_path, "a")], 1, 5 * tp, tp=tp)
    assert (ranks[1] is None) == (tp == 2)
    seen = [bytes(row[: row.index(256)]).decode() for rank in ranks if rank for row in rank]
    assert sorted(seen) == [f"t {n}" for n in range(SAMPLES)]


def test_missing_target_is_refused(tmp_path: Path) -> None:
    def refused(tp: int) -> list[str]:
        args, said = arguments(*ONE, jsonl(tmp_path, "a")), []
        for path in (str(tmp_path / "none.jsonl"), str(tmp_path / "none")):
            with pytest.raises(ValueError) as error:
                datasets.target_samples(args, path)
            said.append(str(error.value))
        return said

    ((file, prefix),) = on_ranks(1, refused)
    assert file == f"{tmp_path}/none.jsonl: no such file or folder."
    assert prefix.startswith(f"{tmp_path}/none: no such data; an indexed dataset is named by")


def test_indexed_target_beside_mock_general_data(tmp_path: Path) -> None:
    ((*rows,),) = on_ranks(1, target, indexed(tmp_path), ["--mock-data"], 1, 9)
    assert len({token for row in rows for token in row}) == 9 * LENGTH


def test_indexed_target_shorter_than_a_sequence_is_refused_by_name(tmp_path: Path) -> None:
    prefix = indexed(tmp_path, documents=1)  # 16 tokens, and no next one

    def refused(tp: int) -> str:
        with pytest.raises(ValueError) as error:
            target(tp, prefix, ["--data-path", prefix], 1, 1)
        return str(error.value)

    (said,) = on_ranks(1, refused)
    assert said.startswith(f"{prefix}: ")


def received(tp: int, path: str, flags: list[str]) -> list[list[int]]:
    """Two target microbatches as the model's forward step gets them."""
    args = arguments(*flags, tp=tp)
    samples = datasets.target_samples(args, path)
    (stream,) = datasets.target_streams(args, samples, 1, 1, args.data_parallel_size)
    return [forward._batch(stream, None, True)["tokens"].tolist()[0] for _ in range(2)]


@pytest.mark.parametrize("flags", [["--no-create-attention-mask-in-dataloader"], []])
def test_tensor_parallel_peers_get_the_batch(tmp_path: Path, flags: list[str]) -> None:
    path = jsonl(tmp_path, "a")
    one, other = on_ranks(2, received, path, [*ONE, path, *flags], timeout=8, tp=2)
    assert one == other and one[0] != one[1]


def test_eod_mask_loss_is_for_samples_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path, "a", '{"text": "one<|end|>two"}')

    def masks(tp: int) -> list[list[float]]:
        found = []
        for more in ((), ("--eod-mask-loss",)):
            samples = datasets.target_samples(arguments(*ONE, path, *more), path)
            found.append(samples[SAMPLES]["loss_mask"].tolist()[:7])
        return found

    ((plain, masked),) = on_ranks(1, masks)
    assert plain == [1] * 7 and masked == [1, 1, 1, 0, 1, 1, 1]
