"""A run that was ended and resumed beside one that was left alone: bit for bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_dr.report import metrics

TRACKER = "latest_checkpointed_iteration.txt"
_OF_THE_CLOCK = ("seconds", " ms", "peak memory bytes")
_OF_TRAINING = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples")


def tracked(folder: Path) -> int:
    """The iteration of the last whole checkpoint; 0 where there is none yet."""
    path = folder / TRACKER
    return int(path.read_text()) if path.exists() else 0


def logged(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Every number but those of the clock, by kind and iteration.

    Raises:
        AssertionError: a step that ran again has another number.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    path = run / "metrics.jsonl"
    for line in metrics.lines(path) if path.exists() else ():
        if line["kind"] in ("run", "end"):
            continue
        key = line.pop("kind"), line.pop("iteration")
        own = {n: v for n, v in line.items() if not any(word in n for word in _OF_THE_CLOCK)}
        assert same(found.setdefault(key, own), own), (key, found[key], own)
    return found


def kept(run: Path, iteration: int) -> dict[str, Any]:
    """All that a checkpoint keeps, by name: weights, optimizer, and what lies beside."""
    folder = run / "saved"
    found = {**_whole(folder / f"iter_{iteration:07d}"), "best": {}}
    for beside in ("dr_target", "dr_reference"):
        path = folder / beside
        path = path if beside == "dr_reference" else path / f"iter_{iteration:07d}"
        if path.is_dir():
            found |= {f"{beside} {name}": value for name, value in _whole(path).items()}
    rollouts = folder / "dr_rollouts" / f"iter_{iteration:07d}.safetensors"
    for path in (rollouts, folder / "dr_reference_log_probs.safetensors"):
        if path.exists():
            found |= {f"{path.parent.name} {n}": value for n, value in load_file(path).items()}
    if (folder / "best").is_dir():
        found["best"] = json.loads((folder / "best" / "best.json").read_text())
        found |= {
            f"best {n}": v for n, v in _whole(folder / "best", tracked(folder / "best")).items()
        }
    return found


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """The model's, of a checkpoint."""
    found = _whole(folder, iteration)
    return {
        name: value for name, value in found.items()
        if isinstance(value, torch.Tensor) and not name.startswith("optimizer")
    }  # fmt: skip


def _whole(folder: Path, iteration: int | None = None) -> dict[str, Any]:
    path = folder if iteration is None else folder / f"iter_{iteration:07d}"
    reader = FileSystemReader(path)
    about = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in about.items()
        if isinstance(value, TensorStorageMetadata)
    }
    _load_state_dict(tensors, reader, no_dist=True)
    common = dist_checkpointing.load_common_state_dict(str(path))
    args = vars(common.pop("args")) if "args" in common else {}
    ours = {n: v for n, v in args.items() if n.startswith("megatron_dr_") or n in _OF_TRAINING}
    return {**tensors, "common": common, "args": ours}


def same(one: Any, other: Any) -> bool:
    """To the last bit; NaN is NaN."""
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys()
            and all(same(value, other[name]) for name, value in one.items())
        )  # fmt: skip
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and (
            torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        )  # fmt: skip
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


def differences(one: dict[Any, Any], other: dict[Any, Any]) -> list[str]:
    """Names of what is not the same in both."""
    names = [n for n in {**one, **other} if n not in one or n not in other]
    return [str(n) for n in names] + [
        f"{n}: {_short(one[n])} and {_short(other[n])}"
        for n in one
        if n in other and not same(one[n], other[n])
    ]


def _short(value: Any) -> str:
    return repr(value)[:300]


def recorded(run: Path) -> dict[str, Any]:
    """What --dr-record wrote, by column."""
    folder = run / "record"
    if not folder.is_dir():
        return {}
    from megatron_dr.report import record

    return dict(record.read(folder).to_pydict())
