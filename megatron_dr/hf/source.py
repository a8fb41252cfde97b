"""A Hugging Face checkpoint's tensors on disk: names, shapes, and slices that are read alone."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_dr.hf.mapping import Box, check_shapes

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# buffers that some checkpoints carry and config.json says as well
_COMPUTED = ".rotary_emb.inv_freq"


class Source:
    """Tensors of safetensors files, or with `allow_pickle` of pytorch_model.bin files.

    Raises:
        ValueError: no weights, an index that names a file that isn't there, pickles not allowed.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.pickled = False
        self.places = self._index("model.safetensors")
        self.pickled = not self.places
        name = "pytorch_model.bin"
        if self.pickled and ((folder / name).exists() or self._listed(name)):
            if not allow_pickle:
                raise ValueError(
                    f"{folder}: only pytorch_model.bin, a pickle that can run code when it is "
                    "read; give --allow-pickle if you trust it."
                )
            self.places = self._index(name)
        if not self.places:
            raise ValueError(f"{folder}: no model.safetensors and no index of such files.")

    def _listed(self, name: str) -> dict[str, str]:
        path = self.folder / f"{name}.index.json"
        if not path.exists():
            return {}
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return found

    def _index(self, name: str) -> dict[str, str]:
        """File of each tensor by name; empty if there is neither a file nor an index."""
        listed = self._listed(name)
        for file in set(listed.values()):
            if not (self.folder / file).exists():
                raise ValueError(f"{self.folder / file}: named by the index, but no such file.")
        if not listed and (self.folder / name).exists():
            listed = {key: name for key in self._open(name).keys()}  # noqa: SIM118
        return {key: file for key, file in listed.items() if not key.endswith(_COMPUTED)}

    def _open(self, file: str) -> Any:
        """safetensors' handle, or a dictionary of memory-mapped tensors."""
        if file not in self.files:
            path = self.folder / file
            if self.pickled:
                self.files[file] = torch.load(path, map_location="cpu", mmap=True)
            else:
                self.files[file] = safe_open(path, "pt")
        return self.files[file]

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor.

        Raises:
            ValueError: a quantised or integer tensor.
        """
        file = self._open(self.places[name])
        if self.pickled:
            return tuple(file[name].shape), file[name].dtype
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
