"""A target that later steps use: saved in one layout, loaded in another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_dr import DRConfig
from megatron_dr.mcore.layer_rows.rows import LayerRows

from . import _megatron
from ._data import LENGTH, Layout
from ._ranks import run_ranks


def rows_of(layout: Layout, score: str, seed: int = 0) -> LayerRows:
    _megatron.initialize(layout)
    model, _, config = _megatron.build(layout)
    sizes = {"kronecker_out": 8, "kronecker_in": 8, "target_refresh": 3}
    dr = DRConfig(
        rows="sample", set="topk", norm="tokens", blocks="matrix", alpha=0.0, score=score,
        seed=seed, **sizes,
    )  # fmt: skip
    return LayerRows(model, config, dr)


def whole_of(rows: LayerRows) -> dict[str, torch.Tensor]:
    """The target's features by name, each rank's pieces at their places."""
    found = {}
    for place in rows.places:
        value, owned = rows.path.targets.of(place), place.owned
        if place.is_vector or place.score != "sketched":
            index = owned.global_index(0, owned.parameter.numel())
            value = torch.zeros(owned.global_numel).index_copy(0, index, value.flatten())
        found[owned.name] = value
    return found


def save(layout: Layout, path: Path, score: str) -> Any:
    rows = rows_of(layout, score)
    rows._prepare(rows._shape_of(1, 0, LENGTH))
    rows.path.targets.begin(True, 1.0)
    for place in rows.places:
        owned, is_sketch = place.owned, place.score == "sketched" and not place.is_vector
        numel = 64 if is_sketch else owned.global_numel
        value = torch.randn(numel, generator=torch.Generator().manual_seed(owned.key % 1000))
        if not is_sketch:
            index = owned.global_index(0, owned.parameter.numel())
            value = value[index].view(owned.parameter.shape)
        rows.path.targets._value[place.number] = value.contiguous()
    assert rows.kept(3) == {}  # a target pass is due
    dist_checkpointing.save(rows.kept(1), str(path))
    return whole_of(rows)


def load(layout: Layout, path: Path, score: str, seed: int = 0) -> Any:
    rows = rows_of(layout, score, seed)
    if not rows.load_kept(path, 1, LENGTH):
        assert rows.target_due(1)
        return None
    assert not rows.target_due(1)
    return whole_of(rows)


@pytest.mark.parametrize("score", ["ghost", pytest.param("sketched", marks=pytest.mark.soak)])
def test_a_kept_target_is_the_same_in_another_layout(tmp_path: Path, score: str) -> None:
    wide, alone = Layout(tp=2, sequence_parallel=True), Layout()
    folders = [tmp_path / "wide", tmp_path / "alone"]
    for folder in folders:
        folder.mkdir()
    saved = run_ranks(2, save, wide, folders[0], score)
    (loaded,) = run_ranks(1, load, alone, folders[0], score)
    for name, value in loaded.items():
        pieces = [part[name] for part in saved]
        # what ranks have pieces of adds up, what they have copies of is on each
        expected = pieces[0] if torch.equal(*pieces) else sum(pieces)
        assert torch.equal(value, expected), name
    assert run_ranks(1, load, alone, folders[0], "exact") == [None]
    if score == "sketched":
        assert run_ranks(1, load, alone, folders[0], score, 1) == [None]
        stages = Layout(pp=2, tied=True)
        run_ranks(1, save, Layout(tied=True), folders[1], score)
        first, last = run_ranks(2, load, stages, folders[1], score)
        name = "embedding.word_embeddings.weight"
        assert first[name].any() and not last[name].any()
