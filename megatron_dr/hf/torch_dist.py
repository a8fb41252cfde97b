"""Read and write Megatron's torch_dist checkpoints tensor by tensor.

A torch_dist checkpoint is one of torch.distributed.checkpoint, with Megatron's common state
(arguments, iteration) as one pickled object in it and a metadata.json beside (megatron.core 0.19,
dist_checkpointing/serialization.py). Megatron's own `save` takes tensors that are all in memory;
the planner here makes each when it is written and drops it: a process holds one at a time.
"""

import argparse
import io
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
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
    """
    first = rank()[0] == 0
    planner = _SavePlanner(pieces, {COMMON: common, **objects} if first else objects)
    save({}, storage_writer=_Writer(folder), planner=planner)
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
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / ".metadata").exists() or not (folder / "metadata.json").exists():
            raise ValueError(f"{folder}: no torch_dist checkpoint.")
        self.folder = folder
        self.storage = FileSystemReader(folder)
        self.metadata = self.storage.read_metadata()
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
        """The whole tensor [shape] at place `index` on the axes in front of it."""
        found = self.tensors[key]
        out = torch.empty((*[1] * len(index), *shape), dtype=found.properties.dtype)
        box = ChunkStorageMetadata(torch.Size((*index, *[0] * len(shape))), out.shape)
        items = create_read_items_for_chunk_list(key, found, [box])
        self.storage.read_data(LoadPlan(items), _Into(out)).wait()
        return out.view(shape)

    def common(self) -> dict[str, Any]:
        """Megatron's common state: `args`, `iteration`, ..."""
        path = self.folder / "common.pt"
        if path.exists():  # before megatron.core 0.19
            return dict(torch.load(path, weights_only=False, pickle_module=_Lenient))
        place = self.storage.storage_data[MetadataIndex(COMMON)]
        with open(self.folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        return dict(torch.load(data, weights_only=False, pickle_module=_Lenient)[0])

    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments by name; empty if it was saved without."""
        return dict(vars(self.common().get("args", argparse.Namespace())))


class _Unknown:
    """Stands for an object of a class that isn't needed, such as Megatron's enums."""

    def __new__(cls, *_: Any, **__: Any) -> "_Unknown":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Lenient:
    """torch.load's `pickle_module`: plain data, tensors and argparse's namespace, and no code.

    Megatron need not be installed to read what it saved, and nothing in the file is called.
    """

    __name__ = "lenient"

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            plain = (module, name) in {
                ("argparse", "Namespace"),
                ("collections", "OrderedDict"),
                ("torch._utils", "_rebuild_tensor_v2"),
            }
            if plain or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
                return super().find_class(module, name)
            return _Unknown
