"""Hugging Face to Megatron: plan who writes what, then write it slice by slice."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_dr.hf import assets, config, torch_dist, vocabulary
from megatron_dr.hf.mapping import Mapped, hf_shapes, mapped_tensors, take
from megatron_dr.hf.model import Model
from megatron_dr.hf.output import agreed, complete, rank
from megatron_dr.hf.source import Source, check_tensors
from megatron_dr.hf.torch_dist import Piece
from megatron_dr.hf.vocabulary import Widened

Shard = tuple[int, int, int]  # pipeline, tensor and expert rank


@dataclass(frozen=True)
class Layout:
    """Parallel sizes that the checkpoint's pieces are cut for; any other layout can load it too."""

    tp: int = 1
    pp: int = 1
    ep: int = 1

    def check(self, model: Model) -> None:
        """
        Raises:
            ValueError: the model can't be divided so.
        """
        for flag, size, count, what in (
            ("--pp", self.pp, model.layers, "layers"),
            ("--ep", self.ep, model.experts or 1, "experts"),
            ("--tp", self.tp, model.heads, "heads"),
        ):
            if size < 1 or count % size:
                raise ValueError(f"{count} {what} can't be divided into {flag} {size}.")

    def shards(self) -> list[Shard]:
        return list(itertools.product(range(self.pp), range(self.tp), range(self.ep)))

    def holds(self, tensor: Mapped, model: Model, shard: Shard) -> bool:
        """Whether this shard writes (its part of) a tensor; copies are written once."""
        stage, _, expert = shard
        first = {"first": 0, "last": self.pp - 1}.get(tensor.entry.stage)
        if stage != (tensor.index[0] * self.pp // model.layers if first is None else first):
            return False
        if len(tensor.index) < 2:
            return expert == 0
        return expert == tensor.index[1] * self.ep // model.experts


@dataclass(frozen=True)
class Plan:
    """A conversion that is known to be possible."""

    source: Source
    model: Model
    layout: Layout
    dtype: torch.dtype
    vocabulary: int
    tensors: list[Mapped]

    def _held(self, shard: Shard) -> list[Mapped]:
        return [t for t in self.tensors if self.layout.holds(t, self.model, shard)]

    def pieces(self, shard: Shard) -> Iterator[Piece]:
        """What one shard writes."""
        for tensor in self._held(shard):
            boxes = tensor.shards(shard[1], self.layout.tp)
            for key, box in itertools.product(tensor.keys, boxes):
                ones = [1] * len(tensor.index)
                yield Piece(
                    key, (*tensor.counts, *tensor.shape),
                    (*tensor.index, *(first for first, _ in box)),
                    (*ones, *(end - first for first, end in box)),
                    self.dtype, partial(take, tensor, box, self.dtype, self.source.read),
                )  # fmt: skip

    def objects(self, shard: Shard) -> dict[str, None]:
        """Megatron's empty extra states."""
        return {
            torch_dist.object_key(
                tensor.key.removesuffix("weight") + "_extra_state", tensor.index, tensor.counts
            ): None
            for tensor in self._held(shard)
            if tensor.entry.extra and shard[1] == 0
        }

    def describe(self, processes: int) -> str:
        """The plan in words, printed before it starts."""
        size = self.dtype.itemsize
        shares = [
            sum(math.prod(p.shape) for s in shards for p in self.pieces(s)) * size
            for shards in (share(self.layout, n, processes) for n in range(processes))
        ]
        largest = max(math.prod(p.shape) for s in self.layout.shards() for p in self.pieces(s))
        parameters = sum(math.prod(shape) for shape in hf_shapes(self.tensors).values())
        layout = self.layout
        note = [self.source.note] if self.source.note else []
        return "\n".join([
            *note,
            f"{self.model.architecture}: {parameters / 1e9:.3f} B parameters, "
            f"{len(self.source.places)} tensors, written as {str(self.dtype)[6:]}",
            f"vocabulary {self.model.vocabulary}, padded to {self.vocabulary}",
            f"pieces for --tp {layout.tp} --pp {layout.pp} --ep {layout.ep}; "
            "other layouts can load them too",
            f"{processes} processes write {_size(sum(shares))}, at most {_size(max(shares))} each; "
            f"each holds one piece at a time, at most {_size(largest * size)}",
        ])  # fmt: skip


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def share(layout: Layout, process: int, processes: int) -> list[Shard]:
    """The shards that a process writes."""
    return layout.shards()[process::processes]


def plan(
    folder: Path, layout: Layout, dtype: torch.dtype | None = None, allow_pickle: bool = False,
    widen: bool = False,
) -> Plan:  # fmt: skip
    """Look at everything but the weights themselves.

    `dtype`: of the written weights; None: the one that all have; `widen`: give the model a word for
    each id of its tokenizer.

    Raises:
        ValueError: what can't be converted, or isn't there.
    """
    model = config.read_model(folder)
    layout.check(model)
    words = vocabulary.words(folder, model, widen)
    source = Source(folder, allow_pickle)
    check_tensors(hf_shapes(mapped_tensors(model, model.vocabulary)), source, model.tied)
    if words > model.vocabulary:
        source, model = Widened(source, words), dataclasses.replace(model, vocabulary=words)
    rows = config.padded_vocabulary(model, layout.tp)
    tensors = mapped_tensors(model, rows)
    for tensor in tensors:
        tensor.shards(0, layout.tp)
    dtypes = {source.about(name)[1] for name in source.places}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(str(found)[6:] for found in dtypes))
        raise ValueError(f"{folder}: tensors are {names}; choose one with --dtype.")
    return Plan(source, model, layout, dtype or dtypes.pop(), rows, tensors)


def convert(plan: Plan, out: Path) -> None:
    """Write the checkpoint (collective).

    Raises:
        ValueError: the output exists, or more processes than shards.
    """
    number, processes = rank()
    shards = plan.layout.shards()
    if processes > len(shards):
        raise ValueError(f"{processes} processes, but --tp, --pp and --ep make {len(shards)}.")
    mine = share(plan.layout, number, processes)
    pieces = [piece for shard in mine for piece in plan.pieces(shard)]
    objects = {key: None for shard in mine for key in plan.objects(shard)}
    with complete(out) as folder:
        with agreed():
            if number == 0:
                _write_beside(plan, folder)
        torch_dist.write(folder / "release", pieces, objects, common_state(plan))


def common_state(plan: Plan) -> dict[str, object]:
    """What Megatron's `--load` reads before the tensors, and compares with its flags."""
    arguments = config.megatron_arguments(plan.model, plan.vocabulary) | {
        "add_position_embedding": True, "use_rotary_position_embeddings": False,
        "tensor_model_parallel_size": plan.layout.tp,
        "pipeline_model_parallel_size": plan.layout.pp,
        "expert_model_parallel_size": plan.layout.ep, "params_dtype": plan.dtype,
        "ckpt_format": "torch_dist",
    }  # fmt: skip
    return {
        "args": argparse.Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0,
        "content_metadata": {"singleton_local_shards": False},
    }  # fmt: skip


def _write_beside(plan: Plan, folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    beside = folder / assets.FOLDER
    assets.copy(plan.source.folder, beside)
    assets.set_values(beside, vocab_size=plan.model.vocabulary)
    (beside / assets.BASE).write_text(assets.name_of(plan.source.folder) + "\n")
    flags = config.command_line(config.megatron_arguments(plan.model, plan.vocabulary))
    (beside / assets.FLAGS).write_text(flags + "\n")
