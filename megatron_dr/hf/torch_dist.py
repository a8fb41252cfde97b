"""Read and write Megatron's torch_dist checkpoints tensor by tensor.

A torch_dist checkpoint is one of torch.distributed.checkpoint, with Megatron's common state
(arguments, iteration) as one pickled object in it and a metadata.json beside (megatron.core 0.19,
dist_checkpointing/serialization.py). Megatron's own `save` takes tensors that are all in memory;
the planner here makes each when it is written and drops it: a process holds one at a time.
"""

import argparse
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_dr.hf.output import rank
from megatron_dr.hf.unpickling import (
    Known,
    check_metadata,
    read_known,
    read_metadata,
    read_object,
    why,
)

COMMON = "common_state/shard_0_1"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that this process writes: where it lies, and how to make it."""

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]


def object_key(key: str, index: tuple[int, ...], counts: tuple[int, ...]) -> str:
    """Megatron's name of an object that belongs to one place on the axes `counts`."""
    return f"{key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, counts))}"


class _SavePlanner(SavePlanner):
    def __init__(self, pieces: list[Piece], objects: dict[str, Any]) -> None:
        self.pieces = {(piece.key, piece.offset): piece for piece in pieces}
        self.objects = objects

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        pass  # everything is known

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                MetadataIndex(piece.key, torch.Size(piece.offset)),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)),
                    TensorProperties(dtype=piece.dtype),
                    torch.Size(piece.size),
                ),
            )
            for piece in self.pieces.values()
        ]
        names = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        return SavePlan(names + items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        key, offset = write_item.index.fqn, write_item.index.offset
        if write_item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self.objects[key]], buffer)  # in a list, as Megatron has it
            buffer.seek(0)
            return buffer
        assert offset is not None
        piece = self.pieces[key, tuple(offset)]
        return piece.make().view(piece.shape)


def write(folder: Path, pieces: list[Piece], objects: dict[str, Any], common: Any) -> None:
    """Write this process's pieces and objects (collective, over all processes).

    `common`: Megatron's common state, written by the first process.

    Raises:
        ValueError: what a process refused when it made a piece.
    """
    first = rank()[0] == 0
    planner = _SavePlanner(pieces, {COMMON: common, **objects} if first else objects)
    try:
        save({}, storage_writer=_Writer(folder), planner=planner)
    except CheckpointException as error:  # of all processes
        for cause, _ in error.failures.values():
            if isinstance(cause, ValueError):
                raise ValueError(str(cause)) from None
        raise
    if first:
        settings = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(settings))


class _Writer(FileSystemWriter):
    """torch's, but it drops a tensor once it is written instead of keeping the last of each key."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                offset, data = file.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(data, file)
                length = file.tell() - offset
                results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                del data
            file.flush()
            os.fsync(file.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


class _Into(DefaultLoadPlanner):
    """Puts all that is read into one tensor."""

    def __init__(self, out: torch.Tensor) -> None:
        super().__init__()
        self.out = out

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.out


class Reader:
    """A torch_dist checkpoint, read tensor by tensor by this process alone.

    Attributes:
        tensors: what is stored of all tensors by key, the optimizer's too.

    Raises:
        ValueError: there is none, or files of it are damaged or not there.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / ".metadata").is_file() or not (folder / "metadata.json").is_file():
            raise ValueError(f"{folder}: no torch_dist checkpoint.")
        self.folder = folder
        self.storage = FileSystemReader(folder)
        self.metadata = read_metadata(folder / ".metadata")
        check_metadata(folder, self.metadata)
        self.storage.set_up_storage_reader(self.metadata, is_coordinator=True)
        self.tensors = {
            key: found
            for key, found in self.metadata.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata)
        }

    def has(self, key: str, index: tuple[int, ...]) -> bool:
        """Whether there is anything of a tensor at place `index` on the axes in front of it."""
        return key in self.tensors and any(
            all(o <= i < o + s for i, o, s in zip(index, chunk.offsets, chunk.sizes, strict=False))
            for chunk in self.tensors[key].chunks
        )

    def read(self, key: str, index: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor [shape] at place `index` on the axes in front of it.

        Raises:
            ValueError: not all of it is there, or its file is damaged.
        """
        found = self.tensors[key]
        out = torch.empty((*[1] * len(index), *shape), dtype=found.properties.dtype)
        box = ChunkStorageMetadata(torch.Size((*index, *[0] * len(shape))), out.shape)
        items = create_read_items_for_chunk_list(key, found, [box])
        if sum(math.prod(item.lengths) for item in items) < out.numel():
            raise ValueError(f"{self.folder}: parts of tensor {key} are missing.")
        try:
            self.storage.read_data(LoadPlan(items), _Into(out)).wait()
        except Exception as error:  # torch's readers raise any
            places = [self.storage.storage_data.get(item.storage_index) for item in items]
            files = sorted({str(self.folder / place.relative_path) for place in places if place})
            where = ", ".join(files) or self.folder / ".metadata"
            raise ValueError(f"{where}: damaged, {key} can't be read ({why(error)}).") from None
        return out.view(shape)

    def common(self) -> dict[str, Any]:
        """Megatron's common state: `args`, `iteration`, ...

        Raises:
            ValueError: it is missing or damaged, or names what could run code.
        """
        path = self.folder / "common.pt"
        if path.is_file():  # before megatron.core 0.19
            with open(path, "rb") as file:
                found = read_object(file, str(path))
        else:
            listed = read_object(*self._object(COMMON))
            found = listed[0] if isinstance(listed, list) and listed else None  # Megatron's form
        if not isinstance(found, dict):
            raise ValueError(f"{self.folder}: damaged, its common state is no dictionary.")
        return found

    def check_objects(self, known: Sequence[Known]) -> None:
        """That all that is no tensor can be read, with `known` beside plain data.

        Raises:
            ValueError: the first that is damaged, or names what could run code.
        """
        for key, found in self.metadata.state_dict_metadata.items():
            if isinstance(found, BytesStorageMetadata):
                read_known(*self._object(key), known)

    def _object(self, key: str) -> tuple[io.BytesIO, str]:
        """A pickled object as it is stored, and what errors call it."""
        place = self.storage.storage_data.get(MetadataIndex(key))
        if place is None:
            raise ValueError(f"{self.folder}: damaged, {key} is missing.")
        with open(self.folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            return io.BytesIO(file.read(place.length)), f"{file.name}, {key}"

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments by name; empty if it was saved without."""
        found = self.common().get("args", argparse.Namespace())
        if not isinstance(found, argparse.Namespace):
            raise ValueError(f"{self.folder}: damaged, its arguments are no namespace.")
        return dict(vars(found))
