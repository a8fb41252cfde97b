"""The table applied to a model: Megatron's tensors from slices of Hugging Face's, and back.

Everything is a copy of rows: no arithmetic, so both directions are exact in every dtype. Rows of
Megatron's vocabulary beyond the model's own are zero on the way there and left out on the way back.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dr.hf.families import FAMILIES, Entry
from megatron_dr.hf.model import Model

Box = tuple[tuple[int, int], ...]  # (first, end) per dimension
Read = Callable[[str, Box], torch.Tensor]  # a slice of a Hugging Face tensor


@dataclass(frozen=True)
class Part:
    """Rows `row` .. `row + length` of Megatron's tensor: rows `start` .. of tensor `name`."""

    name: str
    start: int
    row: int
    length: int


@dataclass(frozen=True)
class Mapped:
    """One tensor of Megatron's checkpoint, of one layer and one expert.

    Attributes:
        index: its place on the axes in front, `counts` their sizes: (), (layer,) or
            (layer, expert).
        shape: of the tensor itself, whole.
    """

    entry: Entry
    index: tuple[int, ...]
    counts: tuple[int, ...]
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def key(self) -> str:
        return self.entry.key

    @property
    def keys(self) -> tuple[str, ...]:
        """All names that it has in checkpoints."""
        return (self.entry.key,) if self.entry.alias is None else (self.key, self.entry.alias)

    @property
    def whole(self) -> Box:
        return tuple((0, size) for size in self.shape)

    def shards(self, rank: int, size: int) -> list[Box]:
        """The boxes of tensor-parallel rank `rank` of `size`: one, or one per stacked matrix.

        Raises:
            ValueError: the dimension can't be divided evenly.
        """
        split, stacked = self.entry.split, self.entry.stacked
        if split is None:
            return [self.whole] if rank == 0 else []
        matrix = self.shape[split] // stacked
        if matrix % size:
            raise ValueError(f"{self.key}: size {matrix} can't be divided into --tp {size}.")
        length = matrix // size
        boxes = []
        for number in range(stacked):
            first = number * matrix + rank * length
            box = list(self.whole)
            box[split] = (first, first + length)
            boxes.append(tuple(box))
        return boxes


def mapped_tensors(model: Model, vocabulary: int) -> list[Mapped]:
    """Every tensor of the model, the first stage's, layer by layer, then the last stage's.

    `vocabulary`: rows of Megatron's embedding, at least the model's own.
    """
    entries = [e for e in FAMILIES[model.architecture].entries if e.when(model)]
    tensors = []
    for stage, layers in (("first", [None]), ("layers", range(model.layers)), ("last", [None])):
        for layer in layers:
            for entry in entries:
                if entry.stage == stage:
                    tensors += list(_mapped(entry, model, layer, vocabulary))
    return tensors


def _mapped(entry: Entry, model: Model, layer: int | None, vocabulary: int) -> Iterator[Mapped]:
    many = "{expert}" in entry.names[0]
    for expert in range(model.experts if many else 1):
        names = [name.format(layer=layer, expert=expert) for name in entry.names]
        parts, row = [], 0
        for number, start, length in entry.rows(model):
            parts.append(Part(names[number], start, row, length))
            row += length
        if row == model.vocabulary and entry.key.split(".")[0] in ("embedding", "output_layer"):
            row = vocabulary
        axes = [] if layer is None else [(layer, model.layers)]
        axes += [(expert, model.experts)] if many else []
        index, counts = tuple(n for n, _ in axes), tuple(count for _, count in axes)
        shape = (row,) if entry.columns is None else (row, entry.columns(model))
        yield Mapped(entry, index, counts, shape, tuple(parts))


def hf_shapes(tensors: list[Mapped]) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face tensors by name."""
    rows: dict[str, int] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        for part in tensor.parts:
            rows[part.name] = max(rows.get(part.name, 0), part.start + part.length)
            columns[part.name] = tensor.shape[1:]
    return {name: (rows[name], *columns[name]) for name in rows}


def check_shapes(
    folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> None:
    """That a checkpoint has the expected tensors, of their shapes.

    Raises:
        ValueError: the first tensor that is missing or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{folder}: tensor {name} is missing.")
        if found[name] != shape:
            raise ValueError(
                f"{folder}: {name} has shape {list(found[name])}, but config.json means "
                f"{list(shape)}."
            )


def take(tensor: Mapped, box: Box, dtype: torch.dtype, read: Read) -> torch.Tensor:
    """A box of Megatron's tensor, from slices of Hugging Face's."""
    (first, end), *others = box
    out = torch.zeros([stop - start for start, stop in box], dtype=dtype)
    for part in tensor.parts:
        low, high = max(first, part.row), min(end, part.row + part.length)
        if low < high:
            start = part.start + low - part.row
            rows = (start, start + high - low)
            out[low - first : high - first] = read(part.name, (rows, *others))
    return out


def split(tensor: Mapped, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors of one whole tensor of Megatron's."""
    rows: dict[str, list[torch.Tensor]] = {}
    for part in tensor.parts:  # a tensor's rows come in ascending order
        rows.setdefault(part.name, []).append(values[part.row : part.row + part.length])
    return {name: torch.cat(pieces) for name, pieces in rows.items()}
