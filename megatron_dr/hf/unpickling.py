"""Pickles of a checkpoint, read without running anything that they name.

A pickle names the functions that rebuild its objects, and reading it calls them. Here only those
are called that a torch_dist checkpoint has: the classes of its `.metadata`, and of its other
objects what torch's own `weights_only` reader takes. Classes of Megatron that nothing here needs
become empty stand-ins, so that it need not be installed. Anything else is refused by name.
"""

import argparse
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_dr.hf.assets import within

_DCP = "torch.distributed.checkpoint"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"  # where torch 2.2 has two of them
_METADATA = frozenset({
    *(f"{_DCP}.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(f"{_DCP}.planner.{name}" for name in (  # Megatron keeps the plan of a save, too
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
    f"{_DCP}.filesystem._StorageInfo", f"{_DCP}.filesystem._StoragePrefix",
    f"{_OLD}.TensorProperties", f"{_OLD}.MEM_FORMAT_ENCODING",
    "torch.Size", "torch.serialization._get_layout", "collections.OrderedDict",
    "pathlib.PosixPath", "pathlib._local.PosixPath",
})  # fmt: skip
# What Megatron's arguments and states have beside plain data (megatron.core.safe_globals).
_PACKAGES = ("megatron.", "megatron_dr.", "transformer_engine.")
_INERT = frozenset({
    "pathlib.PosixPath", "pathlib._local.PosixPath", "signal.Signals", "torch._C.Generator",
    "io.BytesIO", "_io.BytesIO",
    "numpy.ndarray", "numpy.dtype", "numpy.dtypes.UInt32DType",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")
      for name in ("_reconstruct", "scalar")),
})  # fmt: skip
Known = tuple[Any, str]  # what is called, and the name in the file that means it


class _Unknown:
    """Stands for an object of a class that isn't needed, such as Megatron's enums."""

    def __new__(cls, *_: Any, **__: Any) -> "_Unknown":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Named:
    """What an unpickler of `.metadata` finds by name."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in _METADATA:
            return super().find_class(module, name)  # type: ignore[misc]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refused(f"{module}.{name}")


class _Careful(_Named, pickle._Unpickler):
    """In Python, 4 times slower: in C a damaged number makes it fill all memory."""


class _Fast(_Named, pickle.Unpickler):
    pass


class _Refused(Exception):
    """The name that a file may not have."""


def read_metadata(path: Path, checked: bool = False) -> Metadata:
    """A torch_dist checkpoint's `.metadata`; `checked`: it was read before, so it isn't damaged.

    Raises:
        ValueError: it is damaged, or names what no such file needs.
    """
    try:
        found = (_Fast if checked else _Careful)(io.BytesIO(path.read_bytes())).load()
    except _Refused as error:
        raise ValueError(_refusal(path, str(error))) from None
    except Exception as error:  # a damaged pickle raises any
        raise ValueError(f"{path}: damaged, no metadata of a checkpoint ({why(error)}).") from None
    if not isinstance(found, Metadata):
        raise ValueError(f"{path}: damaged, no metadata of a checkpoint.")
    return found


def check_metadata(folder: Path, metadata: Metadata) -> None:
    """That a checkpoint's description has its form, and that its files hold what it says.

    Raises:
        ValueError: what is wrong.
    """
    try:
        ends = _ends(metadata)
        for key, found in metadata.state_dict_metadata.items():
            if isinstance(found, TensorStorageMetadata):
                _check_chunks(key, found)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / '.metadata'}: damaged ({why(error)}).") from None
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: no such file, but the checkpoint has tensors in it.")
        within(folder, path)
        if path.stat().st_size < end:
            raise ValueError(
                f"{path}: cut short, {path.stat().st_size} bytes where the checkpoint has at least "
                f"{end}."
            )


def _ends(metadata: Metadata) -> dict[str, int]:
    """Bytes that each file has at least."""
    ends: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name, end = place.relative_path, place.offset + place.length
        if not isinstance(index, MetadataIndex) or not Path(name).name == name != "..":
            raise ValueError(f"{index} lies in {name!r}, no file of the folder")
        if min(place.offset, place.length) < 0:
            raise ValueError(f"{index} has a negative place")
        ends[name] = max(ends.get(name, 0), end)
    return ends


def _check_chunks(key: str, found: TensorStorageMetadata) -> None:
    if not isinstance(key, str) or not isinstance(found.properties.dtype, torch.dtype):
        raise ValueError(f"{key!r} has no dtype")
    for chunk in found.chunks:
        boxes = zip(found.size, chunk.offsets, chunk.sizes, strict=True)
        if not all(offset >= 0 and 0 <= size <= whole - offset for whole, offset, size in boxes):
            raise ValueError(f"a part of {key!r} lies outside of it")


def read_object(file: BinaryIO, name: str) -> Any:
    """An object of a checkpoint, with stand-ins for what it has of Megatron's classes.

    Args:
        name: what errors call it.

    Raises:
        ValueError: it is damaged, or names what no such object needs.
    """
    names = _unsafe(file, name)
    known: list[Known] = [(argparse.Namespace, "argparse.Namespace")]
    known += [(_Unknown, n) for n in names if n.startswith(_PACKAGES) or n in _INERT]
    return read_known(file, name, known)


def read_known(file: BinaryIO, name: str, known: Sequence[Known] = ()) -> Any:
    """An object that has, beside plain data and what torch is told is safe, `known` alone.

    Raises:
        ValueError: it is damaged, or names something else.
    """
    other = sorted(set(_unsafe(file, name)) - {each for _, each in known})
    if other:
        raise ValueError(_refusal(name, other[0]))
    try:
        with safe_globals([*known]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{name}: damaged ({why(error)}).") from None


def _unsafe(file: BinaryIO, name: str) -> list[str]:
    """Names in it beside those that torch reads; the file is at its beginning afterwards."""
    try:
        file.seek(0)
        found = get_unsafe_globals_in_checkpoint(file)
        file.seek(0)
    except Exception as error:
        raise ValueError(f"{name}: damaged ({why(error)}).") from None
    return found


def _refusal(place: Path | str, name: str) -> str:
    return (
        f"{place}: it names {name}, which no checkpoint of Megatron needs and which could run "
        "code: it is not read."
    )


def why(error: Exception) -> str:
    """A library's error as the end of a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
