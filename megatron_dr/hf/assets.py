"""What travels with a Megatron checkpoint: config.json, tokenizer, generation settings.

They lie in `hf/` of the folder that Megatron loads from and saves to, so that any checkpoint there
can be exported by itself.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOLDER = "hf"
FLAGS = "megatron_flags.txt"
BASE = "base_model.txt"  # the checkpoint that was converted, as PEFT's adapters name it
ADAPTER_CONFIG = "adapter_config.json"  # of PEFT; with it transformers looks for the adapter
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_SUFFIXES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".md")
_TEMPLATES = "additional_chat_templates"  # of a tokenizer with several, beside its default


def within(folder: Path, path: Path) -> Path:
    """A file of a checkpoint's folder as it is; the hub's cache links to files beside its folders.

    Raises:
        ValueError: it is a link out of the folder: what lies there is not the checkpoint's to give
            on, since what is copied may be published.
    """
    whole = folder.resolve()
    if whole.parent.name == "snapshots":
        whole = whole.parent.parent
    if not path.resolve().is_relative_to(whole):
        raise ValueError(
            f"{path}: a link out of its folder, to {path.resolve()}: put the file itself there."
        )
    return path


def check(folder: Path) -> None:
    """Raises:
    ValueError: one of its files that travel is a link out of it.
    """
    list(files(folder))


def files(folder: Path) -> Iterator[Path]:
    """Configuration, tokenizer and chat template files of a checkpoint's folder.

    Raises:
        ValueError: one is a link out of it.
    """
    for path in sorted(folder.iterdir()):
        named = path.suffix in _SUFFIXES or path.name.startswith(("LICENSE", "NOTICE"))
        ours = path.name in (FLAGS, BASE, ADAPTER_CONFIG) or path.name.endswith(_WEIGHTS)
        if path.is_file() and named and not ours:
            yield within(folder, path)
    for path in sorted((folder / _TEMPLATES).glob("*.jinja")):
        yield within(folder, path)


def copy(source: Path, target: Path) -> None:
    """Copy them; `target` is made.

    Raises:
        ValueError: one is a link out of the folder.
    """
    found = list(files(source))
    target.mkdir(parents=True, exist_ok=True)
    for path in found:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def carry(loaded: Path, saved: Path) -> None:
    """Let a run's saved checkpoints have what the loaded one had; call it on one process.

    Nothing is done where the first has none, or the second has its own.
    """
    source, target = loaded / FOLDER, saved / FOLDER
    if not source.is_dir() or target.exists():
        return
    partial = target.with_name(FOLDER + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    copy(source, partial)
    for name in (FLAGS, BASE):
        if (source / name).exists():
            shutil.copyfile(source / name, partial / name)
    partial.rename(target)


def set_values(folder: Path, dtype: torch.dtype | None = None, **values: Any) -> None:
    """Tell config.json the dtype of the weights beside it, and values that are no longer its own.

    Where it says all of them already it isn't touched.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if dtype is not None:
        key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 4 and 5
        values[key] = str(dtype).removeprefix("torch.")
    if any(name not in config or config[name] != value for name, value in values.items()):
        path.write_text(json.dumps(config | values, indent=2) + "\n", encoding="utf-8")


def name_of(folder: Path) -> str:
    """What transformers finds a checkpoint by: its name on the hub if it lies in the hub's cache,
    else its folder."""
    path = folder.resolve()
    cached = path.parent.name == "snapshots" and path.parent.parent.name.split("--")
    if cached and cached[0] == "models":
        return "/".join(cached[1:])
    return str(path)
