"""Indexed datasets with token ids that the vocabulary lacks: refused at the start, or when read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_dr.mcore.data import datasets, ids
from megatron_dr.mcore.dpo.data import open_pairs

from ._datasets import LENGTH, ONE, arguments, jsonl, on_ranks
from ._train import data, flags, run

__all__ = ["data"]

MOST = 256  # of the tests' tokenizer


def write(prefix: Path, token: int, masks: bool = True, kind: type = np.int32) -> str:
    """Eight documents of a sequence and a next token, the last one's third token as given."""
    for ending in ("", "_loss_mask")[: 1 + masks]:
        builder = IndexedDatasetBuilder(f"{prefix}{ending}.bin", dtype=np.uint8 if ending else kind)
        for number in range(8):
            row = torch.arange(LENGTH + 1) + number
            row[2] = token if number == 7 else number
            row = torch.ones_like(row) if ending else row
            builder.add_document(row, [LENGTH + 1])
        builder.finalize(f"{prefix}{ending}.idx")
    return str(prefix)


def record(prefix: Path, count: int, **largest: int) -> None:
    """A manifest as `megatron-dr prepare` writes it."""
    found = {name: {"tokens": count, "largest_id": id_} for name, id_ in largest.items()}
    Path(f"{prefix}.json").write_text(json.dumps({"statistics": found}))


def sentence(prefix: str, token: int) -> str:
    return re.escape(
        f"{prefix}.bin: it has the token id {token}, but the vocabulary's largest is {MOST}: "
        "prepare the data with the model's own tokenizer"
    )


@pytest.mark.parametrize("masks", [True, False], ids=("samples", "text"))
@pytest.mark.parametrize("large", [False, True], ids=("small", "large"))
def test_either_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, masks: bool, large: bool
) -> None:
    """What is small is known at the start, of what is large each sequence when it is read."""
    if large:
        monkeypatch.setattr(ids, "LARGE", 0)
    good, bad = (write(tmp_path / name, id_, masks) for name, id_ in (("good", MOST), ("bad", 257)))

    def tried(tp: int) -> None:
        for path in (good, bad):
            for role in ("general", "target"):
                refused = pytest.raises(ValueError, match=sentence(bad, 257))
                args = arguments(*ONE, path)

                def opened(args: Any = args, role: str = role, path: str = path) -> Any:
                    if role == "target":
                        return datasets.target_samples(args, path)
                    return datasets.general_datasets(args, [8, 0, 0], None)[0]

                if path == bad and not large:
                    with refused:
                        opened()
                    continue
                found = opened()
                if path == bad:
                    with refused:
                        [found[n] for n in range(len(found))]
                else:
                    assert max(int(found[n]["labels"].max()) for n in range(len(found))) == MOST

    on_ranks(1, tried)


def test_pairs(tmp_path: Path) -> None:
    for name in ("chosen", "rejected"):
        write(tmp_path / f"p_{name}", 3 if name == "chosen" else 300)

    def refused(tp: int) -> None:
        config = datasets.dataset_config(arguments(*ONE, jsonl(tmp_path, "a")))
        with pytest.raises(ValueError, match=sentence(f"{tmp_path}/p_rejected", 300)):
            open_pairs(f"{tmp_path}/p", config)

    on_ranks(1, refused)


def test_what_was_recorded_needs_no_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is of this dataset, and not of another that had its name."""
    monkeypatch.setattr(ids, "LARGE", 0)
    prefix, tokens = write(tmp_path / "a", 300), 8 * (LENGTH + 1)
    dataset = IndexedDataset(prefix)
    record(tmp_path / "a", tokens, tokens=300)
    with pytest.raises(ValueError, match=sentence(prefix, 300)):
        ids.check(dataset, prefix, MOST)
    ids.check(dataset, prefix, 300)
    for path in ("a_chosen", "a_rejected"):
        write(tmp_path / path, 300)
    record(tmp_path / "a", tokens, chosen=7, rejected=300)
    ids.check(IndexedDataset(f"{prefix}_chosen"), f"{prefix}_chosen", MOST)
    with pytest.raises(ValueError, match=sentence(f"{prefix}_rejected", 300)):
        ids.check(IndexedDataset(f"{prefix}_rejected"), f"{prefix}_rejected", MOST)
    record(tmp_path / "a", tokens + 1, tokens=300)
    ids.check(dataset, prefix, MOST)  # not known, and too large to read
    for text in ("[]", "{", '{"statistics": {"tokens": 3}}'):
        Path(f"{prefix}.json").write_text(text)
        ids.check(dataset, prefix, MOST)


def test_a_type_that_holds_no_larger_id_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write(tmp_path / "a", 65535, kind=np.uint16)
    monkeypatch.setattr(ids, "_largest", lambda _: pytest.fail("read"))
    ids.check(IndexedDataset(prefix), prefix, 65535)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="the token id 65535, but the vocabulary's largest is 999"):
        ids.check(IndexedDataset(prefix), prefix, 999)


def test_a_run_with_another_tokenizers_data(data: dict[str, str], tmp_path: Path) -> None:
    """One sentence at the start, on all ranks."""
    prefix = write(tmp_path / "a", 300)
    for more in (
        f"--train-data-path {prefix}",
        f"--dr-target-data {prefix} --dr-target-batch-size 4 --dr-slots 2",
    ):
        (code, out, error), (other, _, _) = run(flags(data, more))
        said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
        assert code == other == 2 and len(said) == 1, error[-2000:]
        assert re.search(sentence(prefix, 300), said[0]) and "iteration        1/" not in out
