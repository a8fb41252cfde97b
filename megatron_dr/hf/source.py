"""A Hugging Face checkpoint's tensors on disk: names, shapes, and slices that are read alone.

Which files count is transformers' rule: model.safetensors, then its index, then pytorch_model.bin,
then its index.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_dr.hf.assets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check, within
from megatron_dr.hf.mapping import Box, check_shapes
from megatron_dr.hf.unpickling import why

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# buffers that some checkpoints carry and config.json says as well
_COMPUTED = ".rotary_emb.inv_freq"
_SAFE, _PICKLE = "model.safetensors", "pytorch_model.bin"
_POINTER = b"version https://git-lfs"


def _index_of(name: str) -> str:
    return f"{name}.index.json"


def has_weights(folder: Path) -> list[str]:
    """Which of the two kinds of files lie in a folder, the one that counts first."""
    kinds = ((name, _index_of(name)) for name in (_SAFE, _PICKLE))
    return [kind[0] for kind in kinds if any((folder / name).is_file() for name in kind)]


class Source:
    """Tensors of safetensors files, or with `allow_pickle` of pytorch_model.bin files.

    Attributes:
        places: file of each tensor, by name.
        note: of files that are there and don't count; empty: there are none.

    Raises:
        ValueError: no weights, a damaged file, an index that names one that isn't there, pickles
            not allowed, an adapter that transformers would add to the weights, a link out of the
            folder.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.note = ""
        found = has_weights(folder)
        adapter = [name for name in ADAPTER_WEIGHTS if (folder / name).exists()]
        if not found:
            if adapter:
                raise ValueError(
                    f"{folder}: only {adapter[0]}, an adapter: merge it into its model first."
                )
            raise ValueError(f"{folder}: no {_SAFE} and no index of such files.")
        if adapter and (folder / ADAPTER_CONFIG).exists():
            raise ValueError(
                f"{folder}: {adapter[0]} and {ADAPTER_CONFIG} beside the weights, to which "
                "transformers would add that adapter: merge it, or move the two files away."
            )
        check(folder)
        self.pickled = found[0] == _PICKLE
        if self.pickled and not allow_pickle:
            raise ValueError(
                f"{folder}: only {_PICKLE}, a pickle that can run code when it is read by other "
                "programs; give --allow-pickle to have its tensors, and nothing else, read from it."
            )
        self.places = self._places(found[0])

    def _file(self, name: str) -> bool:
        path = self.folder / name
        return path.is_file() and within(self.folder, path).is_file()

    def _places(self, name: str) -> dict[str, str]:
        index = _index_of(name)
        if self._file(name):
            listed = dict.fromkeys(self._open(name).keys(), name)
            if self._file(index):
                self.note = (
                    f"{self.folder}: {name} and {index} are both there; as transformers does, the "
                    "first is read, the index and the files that it names are not."
                )
        else:
            listed = self._listed(index)
        return {key: file for key, file in listed.items() if not key.endswith(_COMPUTED)}

    def _listed(self, index: str) -> dict[str, str]:
        """File of each tensor by an index, each of them there.

        Raises:
            ValueError: the index is damaged, doesn't fit the files, or is a link out of the folder.
        """
        path = within(self.folder, self.folder / index)
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = {Path(file).name == file != ".." and bool(key) for key, file in listed.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, no index of weights ({why(error)}).") from None
        if names != {True}:
            raise ValueError(f"{path}: its weight_map is empty, or names no file of the folder.")
        for file in sorted(set(listed.values())):
            if not self._file(file):
                raise ValueError(f"{self.folder / file}: named by {index}, but no such file.")
            inside = set(self._open(file).keys())
            for key in sorted(key for key, place in listed.items() if place == file):
                if key not in inside:
                    raise ValueError(f"{path}: it places {key} in {file}, which doesn't have it.")
        return dict(listed)

    def _open(self, file: str) -> Any:
        """safetensors' handle, or a dictionary of memory-mapped tensors.

        Raises:
            ValueError: the file is damaged.
        """
        if file not in self.files:
            path = self.folder / file
            try:
                self.files[file] = _pickled(path) if self.pickled else safe_open(path, "pt")
            except ValueError:
                raise
            except (OSError, SafetensorError) as error:
                raise ValueError(_damaged(path, error)) from None
        return self.files[file]

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor.

        Raises:
            ValueError: a quantised or integer tensor.
        """
        file = self._open(self.places[name])
        if self.pickled:
            shape, dtype = tuple(file[name].shape), file[name].dtype
            if dtype not in _DTYPES.values():
                raise ValueError(f"{name} is {str(dtype)[6:]}; known are {', '.join(_DTYPES)}.")
            return shape, dtype
        found = file.get_slice(name)
        if found.get_dtype() not in _DTYPES:
            raise ValueError(f"{name} is {found.get_dtype()}; known are {', '.join(_DTYPES)}.")
        return tuple(found.get_shape()), _DTYPES[found.get_dtype()]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A slice; nothing else is read."""
        file = self._open(self.places[name])
        found = file[name] if self.pickled else file.get_slice(name)
        values: torch.Tensor = found[tuple(slice(first, end) for first, end in box)]
        return values


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name; torch's `weights_only` reader calls nothing that the file names."""
    try:
        whole = zipfile.is_zipfile(path)  # older files can't be mapped, only read
        found = torch.load(path, map_location="cpu", mmap=whole, weights_only=True)
    except Exception as error:  # a damaged pickle raises any
        raise ValueError(_damaged(path, error)) from None
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: no dictionary of tensors by name.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{path}: {name!r} is no tensor; a file of tensors by name is needed, as "
                "transformers saves it."
            )
    return found


def _damaged(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        pointer = file.read(len(_POINTER)) == _POINTER
    if pointer:
        return f"{path}: a pointer of Git LFS, not the file itself: run `git lfs pull` there."
    return f"{path}: damaged, or the rest of it is missing ({why(error)}): fetch it again."


def check_tensors(expected: dict[str, tuple[int, ...]], source: Source, tied: bool) -> None:
    """That the checkpoint has the table's tensors, of its shapes, and no others.

    A tied model's checkpoint may carry the output layer too, equal to the embedding.

    Raises:
        ValueError: the first tensor that is missing, unknown, or of another shape.
    """
    found = {name: source.about(name)[0] for name in source.places}
    check_shapes(source.folder, expected, found)
    for name in (name for name in found if name not in expected):
        if not (tied and name == "lm_head.weight"):
            raise ValueError(f"{source.folder}: tensor {name} is unknown to this architecture.")
        _check_tied(source)


def _check_tied(source: Source) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    shape, other = (source.about(name)[0] for name in names)
    if shape == other:
        rows = range(0, shape[0], 4096)
        boxes = [((row, min(row + 4096, shape[0])), (0, shape[1])) for row in rows]
        if all(torch.equal(*(source.read(name, box) for name in names)) for box in boxes):
            return
    raise ValueError(
        f"{source.folder}: config.json ties the output layer to the embedding, but lm_head.weight "
        "differs from it."
    )
