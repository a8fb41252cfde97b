"""What a record of weights says: of each corpus, of each sample, as a blend, and by layers."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
from pyarrow import compute

from megatron_dr.report.record import LISTED, about

IDENTITY = ("corpus", "file", "line", "id", "hash")
_SUMS = [("weight", "sum"), ("weight", "count"), ("score", "sum"), ("score", "count")]
_TYPES = (  # of blocks, by what their names have
    ("embedding", "embedding"), ("output layer", "output_layer"), ("norm", "norm"),
    ("attention", "attention"), ("router", "router"), ("experts", "experts"), ("mlp", "mlp"),
)  # fmt: skip
_LAYER = re.compile(r".*?\blayers\.\d+(?=\.|$)")


def corpora(table: pyarrow.Table) -> pyarrow.Table:
    """Of each corpus: mean weight, its share of all weight, mean score, rows; most weight first."""
    found = table.group_by(["corpus"], use_threads=False).aggregate(_SUMS)
    total = compute.sum(found["weight_sum"]).as_py()
    share = compute.divide(found["weight_sum"], total)
    return _sorted(_means(found, ["corpus"]).add_column(2, "share", share))


def samples(table: pyarrow.Table) -> pyarrow.Table:
    """Of each sample: who it is, mean weight and score over steps and blocks, rows.

    A sample of a slot or rank has that one's weight.
    """
    kinds = set(compute.unique(table["kind"]).to_pylist())
    found = table.group_by([*IDENTITY], use_threads=False).aggregate(_SUMS)
    if kinds & set(LISTED):
        each = [one for row in found.to_pylist() for one in _taken_apart(row)]
        found = pyarrow.Table.from_pylist(each, found.schema)
        sums = [
            (name, "sum") for name in ("weight_sum", "weight_count", "score_sum", "score_count")
        ]
        found = found.group_by([*IDENTITY], use_threads=False).aggregate(sums)
        found = found.rename_columns([name.removesuffix("_sum") if name not in IDENTITY else name
                                      for name in found.column_names])  # fmt: skip
    return _sorted(_means(found, [*IDENTITY]))


def _taken_apart(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if row["hash"] is None:
        return
    try:
        both = [json.loads(row[name]) for name in ("id", "hash")]
    except (ValueError, TypeError, RecursionError):
        both = []
    is_of_lists = all(isinstance(one, list) for one in both) and len({len(o) for o in both}) == 1
    if not is_of_lists or not all(isinstance(text, str) for one in both for text in one):
        raise ValueError("the record is damaged: a slot's or rank's ids and hashes are no lists.")
    for own, hashed in zip(*both, strict=True):
        yield row | {"id": own, "hash": hashed}


def _means(found: pyarrow.Table, keys: list[str]) -> pyarrow.Table:
    """`_SUMS` by keys as means; a score is null where no row has one."""
    count = found["score_count"]
    count = compute.if_else(compute.greater(count, 0), count, pyarrow.scalar(None, count.type))
    columns = {
        "weight": compute.divide(found["weight_sum"], found["weight_count"]),
        "score": compute.divide(found["score_sum"], compute.cast(count, pyarrow.float64())),
        "rows": found["weight_count"],
    }
    return pyarrow.table({name: found[name] for name in keys} | columns)


def _sorted(table: pyarrow.Table) -> pyarrow.Table:
    keys = [n for n in IDENTITY if n in table.column_names]
    return table.sort_by([("weight", "descending"), *((key, "ascending") for key in keys)])


def blend(table: pyarrow.Table) -> tuple[dict[str, float], list[str]]:
    """A new blend's weights by path, with sum 1: each corpus' share of all weight; and the corpora
    without a positive one, which a blend can't have.

    Raises:
        ValueError: rows were left out of the record, or are of no one corpus.
    """
    if about(table)["left_out"]:
        raise ValueError(
            "a blend is made of all rows, and the record has only those of the most and least "
            "weight: record with --dr-record-rows as large as a step's rows."
        )
    by_domain = "domain" in compute.unique(table["kind"]).to_pylist()
    path = "file" if by_domain else "corpus"
    found = table.group_by([path], use_threads=False).aggregate([("weight", "sum")])
    sums = dict(zip(found[path].to_pylist(), found["weight_sum"].to_pylist(), strict=True))
    if None in sums:
        raise ValueError(
            "a blend needs the corpus of each row, and some rows' corpus is not in the record (a "
            "slot or rank with samples of several): record sample or domain rows."
        )
    if not all(map(math.isfinite, sums.values())):
        raise ValueError("a blend needs finite weights, and the record has NaN or Inf.")
    kept = {name: value for name, value in sorted(sums.items()) if value > 0}
    total = sum(kept.values())
    if not kept:
        raise ValueError("no corpus has a positive weight.")
    return {name: value / total for name, value in kept.items()}, sorted(sums.keys() - kept.keys())


@dataclass(frozen=True)
class Layer:
    """Of a layer, or of a type of layers.

    Attributes:
        blocks: how many.
        magnitude: mean |weight|, and `moved`: mean |weight - 1|, away from the plain mean.
        spearman: rank correlation of its rows' weights with those of all blocks; NaN where either
            is constant.
    """

    blocks: int
    magnitude: float
    moved: float
    spearman: float


def layers(table: pyarrow.Table) -> tuple[dict[str, Layer], dict[str, Layer]]:
    """By layer in the model's order, and by type: which carry weight, and whether the same rows.

    A row is a sample where its identity is known, else a row of a step. Only rows that the record
    has of every block are looked at.

    Raises:
        ValueError: a record of one block, or without such rows.
    """
    weight_BN, blocks = _by_block(table)
    groups: tuple[dict[str, list[int]], dict[str, list[int]]] = ({}, {})
    for number, block in enumerate(blocks):
        for names, name in zip(groups, (layer_of(block), type_of(block)), strict=True):
            names.setdefault(name, []).append(number)
    whole_N = weight_BN.mean(0)
    by_layer, by_type = (
        {name: _layer(weight_BN[numbers], whole_N) for name, numbers in names.items()}
        for names in groups
    )
    return by_layer, by_type


def layer_of(block: str) -> str:
    """`decoder.layers.3` of a block inside it; outside the layers the module."""
    found = _LAYER.match(block)
    return found.group() if found else ".".join(block.split(".")[:2])


def type_of(block: str) -> str:
    """Attention, mlp, norm, embedding, ...; `layer` of a whole one."""
    found = (name for name, part in _TYPES if part in block)
    return next(found, "layer" if _LAYER.fullmatch(block) else "other")


def _layer(weight_BN: np.ndarray, whole_N: np.ndarray) -> Layer:
    from scipy import stats

    own_N = weight_BN.mean(0)
    constant = any(np.ptp(of_N) == 0 for of_N in (own_N, whole_N)) or len(own_N) < 2
    rank = float("nan") if constant else float(stats.spearmanr(own_N, whole_N).statistic)
    return Layer(
        len(weight_BN), float(np.abs(weight_BN).mean()), float(np.abs(weight_BN - 1).mean()), rank
    )  # fmt: skip


def _by_block(table: pyarrow.Table) -> tuple[np.ndarray, list[str]]:
    """Mean weights [B, N] of the rows that every block has, and the blocks in the model's order."""
    blocks = sorted(compute.unique(table["block"]).to_pylist(), key=_order)
    if len(blocks) < 2:
        raise ValueError(
            f"the record has one block, {blocks[0]}: record with --dr-blocks layer or matrix."
        )
    known = compute.all(compute.is_valid(table["hash"])).as_py()
    is_sample = compute.unique(table["kind"]).to_pylist() == ["sample"]
    keys = [*IDENTITY] if known and is_sample else ["step", "row"]
    means = table.group_by(["block", *keys], use_threads=False).aggregate([("weight", "mean")])
    each = zip(*(means[key].to_pylist() for key in keys), strict=True)
    number: dict[tuple[Any, ...], int] = {}
    column_N = np.array([number.setdefault(key, len(number)) for key in each])
    place = {block: n for n, block in enumerate(blocks)}
    row_N = np.array([place[block] for block in means["block"].to_pylist()])
    weight_BN = np.full((len(blocks), len(number)), np.nan)
    seen_BN = np.zeros(weight_BN.shape, bool)
    weight_BN[row_N, column_N], seen_BN[row_N, column_N] = means["weight_mean"].to_numpy(), True
    weight_BN = weight_BN[:, seen_BN.all(0)]
    if not weight_BN.shape[1]:
        raise ValueError(
            "no row is in the record of every block: record with a larger --dr-record-rows."
        )
    return weight_BN, blocks


def _order(block: str) -> tuple[Any, ...]:
    """The model's: the embedding first, then by layer; outside the layers by name."""
    parts = [(int(part), "") if part.isdigit() else (-1, part) for part in block.split(".")]
    return ("embedding" not in block, "layers" not in block, parts)
