"""Tokenizers with more ids than the model has words: refused, or the model widened by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_dr.hf import to_megatron, vocabulary
from megatron_dr.hf.torch_dist import Reader

from ._convert import make, run

VOCAB = {"a": 0, "b": 1, "c": 2}
TOKEN = {"content": "<x>", "special": True}
FILES: dict[str, tuple[dict[str, Any], int | None]] = {
    "none": ({}, None),
    "nothing said": ({"tokenizer.json": {}}, None),
    "vocabulary": ({"tokenizer.json": {"model": {"vocab": VOCAB}}}, 3),
    "gaps": ({"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 7}}}}, 8),
    "pieces": ({"tokenizer.json": {"model": {"vocab": [["a", -1.5], ["b", -2.0]]}}}, 2),
    "added": (
        {"tokenizer.json": {"model": {"vocab": VOCAB}, "added_tokens": [TOKEN | {"id": 9}]}}, 10
    ),
    "pad that is new": (
        {"tokenizer.json": {"model": {"vocab": VOCAB}}, "tokenizer_config.json": {
            "pad_token": "[PAD]", "eos_token": {"content": "c"}, "bos_token": None,
        }}, 4,
    ),
    "more that are new": (
        {"tokenizer.json": {"model": {"vocab": VOCAB}},
         "tokenizer_config.json": {"extra_special_tokens": ["<x>", "<y>"]},
         "special_tokens_map.json": {"additional_special_tokens": [TOKEN]}}, 5,
    ),
    "decoder": (
        {"tokenizer.json": {"model": {"vocab": VOCAB}},
         "tokenizer_config.json": {"added_tokens_decoder": {"400": TOKEN}}}, 4,
    ),
    "slow": ({"vocab.json": VOCAB, "added_tokens.json": {"<x>": 3}}, 4),
    "sentencepiece": ({"added_tokens.json": {"<pad>": 32000}}, 32001),
}  # fmt: skip


@pytest.mark.parametrize("files, expected", FILES.values(), ids=FILES)
def test_size_of_a_tokenizer(tmp_path: Path, files: dict[str, Any], expected: int | None) -> None:
    """transformers 5 has these lengths for tokenizers of such files."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert vocabulary.size(tmp_path) == expected


def tokenizer(folder: Path, ids: int) -> None:
    found = {"model": {"vocab": {f"t{n}": n for n in range(ids)}}}
    (folder / "tokenizer.json").write_text(json.dumps(found))


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before a conversion and, for a checkpoint of an earlier one, before an export."""
    make(tmp_path / "hf", vocab_size=101)
    tokenizer(tmp_path / "hf", 101)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    for place, way in (
        (tmp_path / "hf", "hf-to-mcore"),
        (tmp_path / "mcore" / "hf", "mcore-to-hf"),
    ):
        tokenizer(place, 104)
        source = place if way == "hf-to-mcore" else place.parent
        assert run(way, source, tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert (
            f"{place}: the tokenizer has ids up to 103, but config.json's vocab_size is 101" in said
        )
        assert "--widen-vocabulary" in said and said.count("\n") == 1
    tokenizer(tmp_path / "mcore" / "hf", 400)
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--widen-vocabulary") == 2
    assert "has 128 rows, but the tokenizer" in capsys.readouterr().err
    tokenizer(tmp_path / "hf", 101)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--widen-vocabulary") == 2
    assert "no more ids than the model has words: drop the flag" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_widened(tmp_path: Path, tied: bool) -> None:
    """New rows are the mean of the old ones, in every layout's pieces; the rest is as it was."""
    values = make(tmp_path / "hf", vocab_size=101, tie_word_embeddings=tied)
    tokenizer(tmp_path / "hf", 160)
    argv = ("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore", "--tp", 2, "--widen-vocabulary")
    assert run(*argv) == 0
    assert "--padded-vocab-size 256" in (tmp_path / "mcore/hf/megatron_flags.txt").read_text()
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 160
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name][: len(value)].equal(value)
        if len(found[name]) != len(value):
            mean = value.double().mean(0).float()
            assert len(found[name]) == 160
            torch.testing.assert_close(found[name][101:], mean.expand(59, -1))
    assert len(found["model.embed_tokens.weight"]) == 160


def test_rows_that_were_trained_are_exported_by_name(tmp_path: Path) -> None:
    """Of a checkpoint whose tokenizer has grown: its rows of padding."""
    make(tmp_path / "hf", vocab_size=101)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    tokenizer(tmp_path / "mcore" / "hf", 104)
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out", "--widen-vocabulary") == 0
    key = "embedding.word_embeddings.weight"
    rows = Reader(tmp_path / "mcore" / "release").read(key, (), (128, 10))
    found = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert found.equal(rows[:104])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 104
    again = to_megatron.plan(tmp_path / "out", to_megatron.Layout())
    assert again.model.vocabulary == 104
