"""Prepared datasets and packs through Megatron's builder and the training entry."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from pyarrow import parquet

from megatron_dr.mcore.data import datasets
from megatron_dr.mcore.data.samples import PreparedSamples
from megatron_dr.mcore.loop import data_watch
from megatron_dr.report import metrics

from ..data import _chat
from ._datasets import LENGTH, ONE, arguments, general, indexed, on_ranks, target
from ._pairs import some
from ._train import MODEL, SENTENCES, run

JSON = dict[str, Any]


def prepare(prefix: Path, samples: list[tuple[list[int], list[int]]]) -> str:
    """Write (token ids, loss mask) of each sample as the two indexed datasets."""
    for ending, kind, column in (("", np.int32, 0), ("_loss_mask", np.uint8, 1)):
        builder = IndexedDatasetBuilder(f"{prefix}{ending}.bin", dtype=kind)
        for sample in samples:
            builder.add_document(torch.tensor(sample[column]), [len(sample[column])])
        builder.finalize(f"{prefix}{ending}.idx")
    return str(prefix)


def from_jsonl(prefix: Path, lines: list[JSON]) -> str:
    """The samples of byte tokens that JSONL lines are."""
    samples = []
    for line in lines:
        prompt, text = line.get("prompt", ""), line.get("text", line.get("response", ""))
        ids = [*prompt.encode(), *text.encode(), 256]
        samples.append((ids, [int(n >= max(len(prompt.encode()), 1)) for n in range(len(ids))]))
    return prepare(prefix, samples)


LINES: list[JSON] = [{"text": f"a {n}"} for n in range(8)]
LINES += [{"prompt": "two and two is ", "response": "4"}, {"text": "far longer than a sequence"}]


def both(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return str(path), from_jsonl(tmp_path / "p", LINES)


@pytest.mark.parametrize("pack", [(), ("--dr-pack",)], ids=("padded", "packed"))
def test_prepared_samples_are_those_of_jsonl(tmp_path: Path, pack: tuple[str, ...]) -> None:
    """Sample by sample, in the same order, over epochs, in both roles."""
    paths = both(tmp_path)

    def read(tp: int) -> list[list[Any]]:
        out = []
        for path in paths:
            args = arguments(*ONE, path, *pack)
            train_set, _, _ = datasets.general_datasets(args, [25, 0, 0], None)
            samples = datasets.target_samples(args, path)
            (stream,) = datasets.target_streams(args, samples, 1, 1, 1)
            assert stream is not None
            every = [train_set[n] for n in range(25)] + [next(stream) for _ in range(25)]
            out.append([{k: v.tolist() for k, v in s.items()} for s in every])
        return out

    ((one, other),) = on_ranks(1, read)
    assert len(one) == 50 and one == other
    if pack:
        counts = [s["num_packed"] for s in one[:25]]
        assert sum(counts) > 30 and max(counts) >= 2  # samples share packs


def test_conversations_in_a_folder_of_parquet_need_no_preparing(tmp_path: Path) -> None:
    """In both roles, beside JSONL in a blend, with a template by name; a wrong row is named."""
    folder, tokenizer = tmp_path / "talks", _chat.saved(tmp_path / "tokenizer")
    folder.mkdir()
    asked = {"role": "user", "content": "Hi"}
    said = {"role": "assistant", "reasoning_content": "why"}
    lines = [{"messages": [asked, said | {"content": f"{n}"}]} for n in range(4)]
    parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "part-0.parquet")
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "7"}\n')
    length = ["--seq-length", "64", "--max-position-embeddings", "64"]
    flags = ["--tokenizer-model", tokenizer, *length]

    def read(tp: int) -> list[list[str]]:
        args = arguments(*flags, *ONE, "1", str(folder), "1", str(more))
        train_set, _, _ = datasets.general_datasets(args, [8, 0, 0], None)
        samples = datasets.target_samples(args, str(folder))
        decode = datasets.dataset_config(args).tokenizer.detokenize
        every = [train_set[n] for n in range(8)] + [samples[n] for n in range(4)]
        args = arguments(*flags, *ONE, str(more), *thinking)
        samples = datasets.target_samples(args, str(folder))
        every += [samples[n] for n in range(4)]
        return [decode(s["labels"][s["loss_mask"] == 1].tolist()) for s in every]

    thinking = ("--chat-template", "qwen3", "--dr-thoughts", "all")
    (found,) = on_ranks(1, read)
    answers = [f"{n}<|im_end|>" for n in range(4)]
    assert sorted(found[:8]) == sorted([*answers, *["<|im_end|>"] * 4]) and found[8:12] == answers
    assert found[12:] == [f"<think>\nwhy\n</think>\n\n{answer}" for answer in answers]
    lines.append({"messages": []})
    parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "part-0.parquet")
    (refusal,) = on_ranks(1, general, [*flags, *ONE, str(folder)], [8, 0, 0])
    assert refusal.startswith(f"{folder}/part-0.parquet:5: 'messages' must be a list of messages")


def test_blend_and_split_of_prepared_samples(tmp_path: Path) -> None:
    a = from_jsonl(tmp_path / "a", [{"text": f"a {n}"} for n in range(10)])
    b = from_jsonl(tmp_path / "b", [{"text": f"b {n}"} for n in range(10)])
    ((train_set, _, _),) = on_ranks(1, general, [*ONE, "3", a, "1", b], [40, 0, 0])
    expected = {f"a {n}": 3 for n in range(10)} | {f"b {n}": 1 for n in range(10)}
    assert Counter(train_set) == expected
    (parts,) = on_ranks(1, general, ["--split", "50,30,20", "--data-path", a], [5, 3, 2])
    assert sorted(sum(parts, [])) == [f"a {n}" for n in range(10)]


def test_packs_of_the_general_role_have_each_sample_once_an_epoch(tmp_path: Path) -> None:
    path = from_jsonl(tmp_path / "a", [{"text": f"{n:02d}"} for n in range(30)])

    def read(tp: int) -> list[str]:
        args = arguments(*ONE, path, "--dr-pack")
        train_set, _, _ = datasets.general_datasets(args, [12, 0, 0], None)
        return [bytes(t for t in train_set[n]["tokens"].tolist() if t < 256).decode()
                for n in range(12)]  # fmt: skip

    one, other = on_ranks(2, read)  # 2 inputs each: 8 in a pack of 16
    assert one == other
    for epoch in (one[:4], one[4:8], one[8:]):
        assert sorted(re.findall("..", "".join(epoch))) == [f"{n:02d}" for n in range(30)]
    assert one[:4] != one[4:8]


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    good = ([1, 2, 3], [0, 1, 1])
    cases = {
        "fewer": ([good, good], [good], "it has 2 samples, but {p}_loss_mask has 1"),
        "shorter": ([good, good], [good, ([], [0, 1])],
                    "sample 1 has 3 tokens, but 2 in {p}_loss_mask"),
    }  # fmt: skip
    for name, (tokens, masks, message) in cases.items():
        prefix = str(tmp_path / name)
        prepare(tmp_path / name, tokens)
        builder = IndexedDatasetBuilder(f"{prefix}_loss_mask.bin", dtype=np.uint8)
        for _, mask in masks:
            builder.add_document(torch.tensor(mask), [len(mask)])
        builder.finalize(f"{prefix}_loss_mask.idx")
        with pytest.raises(ValueError) as error:
            PreparedSamples(prefix, LENGTH, 0)
        assert str(error.value).startswith(f"{prefix}: " + message.format(p=prefix))
    (tmp_path / "fewer_loss_mask.bin").unlink()
    with pytest.raises(ValueError, match="no such file"):
        PreparedSamples(str(tmp_path / "fewer"), LENGTH, 0)


def test_running_text_is_neither_mixed_with_samples_nor_packed(tmp_path: Path) -> None:
    text, prefix = indexed(tmp_path), both(tmp_path)[1]

    def refused(tp: int) -> list[str]:
        said = []
        for flags in ((*ONE, "1", prefix, "1", text), (*ONE, text, "--dr-pack"),
                      ("--mock-data", "--dr-pack")):  # fmt: skip
            with pytest.raises(ValueError) as error:
                datasets.general_datasets(arguments(*flags), [4, 0, 0], None)
            said.append(str(error.value))
        with pytest.raises(ValueError) as error:
            target(tp, text, [*ONE, prefix, "--dr-pack"], 1, 1)
        return [*said, str(error.value)]

    ((mixed, *packs),) = on_ranks(1, refused)
    assert mixed.startswith("the general data mixes samples") and text in mixed
    for message, name in zip(packs, (text, "--mock-data", text), strict=True):
        assert message.startswith(f"--dr-pack packs samples, and {name} is running text")


# -- the entry -------------------------------------------------------------------------------------
@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    return {
        name: from_jsonl(tmp_path / name, [{"text": f"{n} {SENTENCES[n % 4]}"[: 9 + 5 * (n % 4)]}
                                           for n in range(count)])
        for name, count in (("general", 60), ("target", 12), ("held_out", 16))
    }  # fmt: skip


SLOTS = "--dr-slots 4"
ROWS = "--dr-rows sample --dr-blocks matrix --dr-set topk --dr-norm tokens --dr-score exact"
LORA = f"{ROWS} --dr-lora-rank 4 --lr 1e-2"


def flags(data: dict[str, str], more: str, steps: int = 3) -> list[str]:
    return f"""{MODEL} --train-iters {steps} --train-data-path {data["general"]}
        --valid-data-path {data["held_out"]} --dr-pack --dr-target-data {data["target"]}
        --dr-target-batch-size 4 --dr-target-valid-data {data["held_out"]}
        --make-vocab-size-divisible-by 136 {more}""".split()


LAYOUTS = {
    "tp2-sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp2": ("--pipeline-model-parallel-size 2", 2),
    "vpp": ("--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2", 2),
}


@pytest.mark.parametrize("rows", some({"slot": SLOTS, "sample": ROWS, "adapters": LORA}))
def test_packs_train_alike_in_every_layout(data: dict[str, str], tmp_path: Path, rows: str) -> None:
    """And the losses fall, in both roles."""
    base = tmp_path / "base"
    rows += " --num-layers 4"
    assert run(flags(data, f"{rows} --save {base} --save-interval 1", 1), 1)[0][0] == 0
    load = f"--load {base} --finetune --no-load-optim --no-load-rng"
    found = []
    layouts = list(LAYOUTS.values())[: 1 if rows.startswith(LORA) else None]
    for number, (layout, ranks) in enumerate([("", 1), *layouts]):
        path = tmp_path / f"metrics{number}.jsonl"
        code, _, error = run(flags(data, f"{rows} {layout} {load} --dr-metrics {path}"), ranks)[-1]
        assert code == 0, error
        lines = metrics.read(path, "train")
        found.append([x for m in lines for x in (m["lm loss"], m["target loss"])])
    assert found[0][-1] < found[0][1] and found[0][-2] < found[0][0]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-4)


def test_a_file_that_changes_is_said(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of both roles, training and held out, before a checkpoint."""
    times = itertools.count()
    monkeypatch.setattr(data_watch, "_state", lambda file: (0, 0, next(times)))
    saved = f"--save {tmp_path / 'saved'} --save-interval 1"
    ((code, out, error),) = run(flags(data, f"{SLOTS} {saved}", 1), 1)
    assert code == 0, error
    for path in data.values():
        assert f"WARNING: {path}.bin was changed while the run reads it" in out, path


@pytest.mark.soak
def test_packs_resume_where_they_stopped(data: dict[str, str], tmp_path: Path) -> None:
    """On two data ranks, past the first epoch of either role."""
    paths = [tmp_path / name for name in ("whole.jsonl", "first.jsonl", "second.jsonl")]
    checkpoint = f"{ROWS} --save {tmp_path / 'saved'} --save-interval 2"
    more = [(ROWS, paths[0]), (f"{checkpoint} --exit-interval 2", paths[1]),
            (f"{checkpoint} --load {tmp_path / 'saved'}", paths[2])]  # fmt: skip
    for extra, path in more:
        found = run(flags(data, f"{extra} --dr-metrics {path}", 6))
        assert [code for code, _, _ in found] == [0, 0], found[0][2]
    whole, *parts = [
        {m["iteration"]: (m["lm loss"], m["target loss"]) for m in metrics.read(path, "train")}
        for path in paths
    ]
    assert list(whole) == [1, 2, 3, 4, 5, 6]
    for step, pair in (parts[0] | parts[1]).items():
        assert pair == pytest.approx(whole[step], abs=1e-5)


@pytest.mark.parametrize("more, sentence", {
    "--micro-batch-size 2": "--dr-pack makes a microbatch of one pack, not of 2: set",
    "--context-parallel-size 2": "--dr-pack with --context-parallel-size 2 would cut samples",
    f"{ROWS} --dr-target-pass merged": "--dr-pack makes a microbatch of one role's samples",
    f"{ROWS} --num-experts 2": "can't follow the samples of a pack into experts",
}.items())  # fmt: skip
def test_what_packs_refuse(data: dict[str, str], more: str, sentence: str) -> None:
    code, out, error = run(flags(data, more))[0]
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert code == 2 and len(said) == 1 and sentence in said[0], error[-2000:]
    assert "iteration        1/" not in out


def test_packs_without_the_plugin(data: dict[str, str]) -> None:
    """--dr-pack alone switches no projection on."""
    argv = f"""{MODEL} --train-iters 3 --train-data-path {data["general"]} --dr-pack
        --valid-data-path {data["held_out"]}""".split()
    code, out, error = run(argv, 1)[0]
    assert code == 0, error
    assert "lm loss" in out and "dr residual" not in out
