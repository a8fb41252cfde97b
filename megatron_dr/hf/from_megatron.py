"""Megatron to Hugging Face: layer by layer, each process its own files."""

import json
import math
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_dr.hf import adapters, assets
from megatron_dr.hf.adapters import Adapters
from megatron_dr.hf.config import check_agreement, read_model
from megatron_dr.hf.mapping import Mapped, check_shapes, hf_shapes, mapped_tensors, split
from megatron_dr.hf.model import Model
from megatron_dr.hf.output import agreed, complete, rank, write_tensors
from megatron_dr.hf.torch_dist import Reader
from megatron_dr.hf.vocabulary import words

TRACKER = "latest_checkpointed_iteration.txt"
_LORA = ("lora_a", "lora_b")
_MODEL = ("embedding.", "decoder.", "output_layer.")  # beside them: optimizer, random state


@dataclass(frozen=True)
class Export:
    """A checkpoint that is known to be exportable.

    Attributes:
        files: the tensors of each file, in order.
        adapters: of LoRA, merged into the weights that are read.
    """

    reader: Reader
    model: Model
    assets: Path
    dtype: torch.dtype
    files: list[list[Mapped]]
    adapters: Adapters | None = None

    @property
    def tensors(self) -> list[Mapped]:
        return [tensor for file in self.files for tensor in file]

    def name(self, number: int) -> str:
        if len(self.files) == 1:
            return "model.safetensors"
        return f"model-{number + 1:05d}-of-{len(self.files):05d}.safetensors"

    def read(self, tensor: Mapped) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of one of Megatron's, adapters merged."""
        key = _found(tensor, self.reader.tensors)
        whole = self.reader.read(key, tensor.index, tensor.shape)
        if self.adapters is not None:
            whole = self.adapters.merged(tensor, whole)
        return split(tensor, whole.to(self.dtype))


def checkpoint_folder(path: Path) -> Path:
    """The newest checkpoint of a folder that Megatron saves to, or the checkpoint itself.

    Raises:
        ValueError: the file that names the newest one doesn't.
    """
    if not (path / TRACKER).is_file():
        return path
    latest = (path / TRACKER).read_text(errors="replace").strip()
    if latest == "release":
        return path / latest
    if not (latest.isascii() and latest.isdigit() and len(latest) < 20):
        raise ValueError(
            f"{path / TRACKER}: {latest[:50]!r} is no iteration; name the checkpoint's own folder, "
            "such as iter_0000100."
        )
    return path / f"iter_{int(latest):07d}"


def find_assets(path: Path, reader: Reader, given: Path | None) -> Path:
    """The folder with config.json: given, beside the checkpoint, or where the run had loaded from.

    Raises:
        ValueError: nowhere.
    """
    if given is not None:
        return given
    arguments = reader.arguments()
    loaded = [arguments.get(name) for name in ("load", "pretrained_checkpoint")]
    places = [path, reader.folder.parent, *(Path(p) for p in loaded if isinstance(p, str) and p)]
    for place in places:
        if (place / assets.FOLDER / "config.json").exists():
            return place / assets.FOLDER
    tried = ", ".join(str(place / assets.FOLDER) for place in dict.fromkeys(places))
    raise ValueError(f"no config.json in {tried}; name its folder with --config.")


def plan(
    path: Path, config: Path | None = None, dtype: torch.dtype | None = None,
    file_size: int = 5 * 10**9, lora_alpha: float | None = None, widen: bool = False,
) -> Export:  # fmt: skip
    """Look at everything but the weights.

    `dtype`: of the exported weights, None: as they are; `file_size`: bytes of one file, about;
    `lora_alpha`: of adapters, where the checkpoint's arguments don't say it; `widen`: export a row
    for each id of the tokenizer, where config.json has fewer.

    Raises:
        ValueError: what can't be exported, or isn't there.
    """
    reader = Reader(checkpoint_folder(path))
    folder = find_assets(path, reader, config)
    assets.check(folder)
    model = read_model(folder)
    check_agreement(model, reader.arguments())
    own, model = model.vocabulary, replace(model, vocabulary=words(folder, model, widen))
    found = reader.tensors
    embedding = "embedding.word_embeddings.weight"
    if embedding not in found:
        raise ValueError(f"{reader.folder}: tensor {embedding} is missing.")
    rows = found[embedding].size[0]
    if rows < own:
        raise ValueError(
            f"{reader.folder}: the embedding has {rows} rows, but config.json {own}; train with "
            "the --padded-vocab-size that the conversion wrote."
        )
    if rows < model.vocabulary:
        raise ValueError(
            f"{reader.folder}: the embedding has {rows} rows, but the tokenizer in {folder} ids up "
            f"to {model.vocabulary - 1}: the model was not trained with that tokenizer."
        )
    tensors = mapped_tensors(model, rows)
    _check(reader.folder, tensors, {key: tuple(stored.size) for key, stored in found.items()})
    dtype = dtype or found[embedding].properties.dtype
    if not dtype.is_floating_point:
        raise ValueError(f"{reader.folder}: {embedding} is {str(dtype)[6:]}; choose --dtype.")
    files = _files(tensors, dtype.itemsize, file_size)
    return Export(reader, model, folder, dtype, files, adapters.find(reader, lora_alpha))


def _check(folder: Path, tensors: list[Mapped], found: dict[str, tuple[int, ...]]) -> None:
    check_shapes(folder, {_found(t, found): (*t.counts, *t.shape) for t in tensors}, found)
    known = {key for tensor in tensors for key in tensor.keys}
    known |= {key.removesuffix("weight") + f"{name}.weight" for key in known for name in _LORA}
    for key in found:
        if key.startswith(_MODEL) and key not in known:
            raise ValueError(f"{folder}: tensor {key} is unknown to this architecture.")


def _found(tensor: Mapped, tensors: Container[str]) -> str:
    """The name that a tensor has in this checkpoint."""
    return next((key for key in tensor.keys if key in tensors), tensor.key)


def _files(tensors: list[Mapped], itemsize: int, limit: int) -> list[list[Mapped]]:
    """The tensors in files of at most `limit` bytes, or of one tensor."""
    files: list[list[Mapped]] = [[]]
    size = 0
    for tensor in tensors:
        more = math.prod(tensor.shape) * itemsize
        if files[-1] and size + more > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += more
    return files


def convert(export: Export, out: Path) -> None:
    """Write the Hugging Face checkpoint (collective).

    Raises:
        ValueError: the output exists.
    """
    number, processes = rank()
    with complete(out) as folder:
        with agreed():
            for file in range(number, len(export.files), processes):
                tensors: dict[str, torch.Tensor] = {}
                for tensor in export.files[file]:
                    tensors |= export.read(tensor)
                write_tensors(tensors, folder / export.name(file))
        if number == 0:
            _write_beside(export, folder)


def _write_beside(export: Export, folder: Path) -> None:
    assets.copy(export.assets, folder)
    assets.set_values(folder, export.dtype, vocab_size=export.model.vocabulary)
    if len(export.files) == 1:
        return
    places, size = {}, 0
    for number, tensors in enumerate(export.files):
        for name, shape in hf_shapes(tensors).items():
            places[name] = export.name(number)
            size += math.prod(shape) * export.dtype.itemsize
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
