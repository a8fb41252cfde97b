"""What a run was started with, by flag: compared over ranks, and kept in its checkpoints.

Values are plain (JSON), so that a checkpoint can be read by another version. Of data there is the
content, not the path: a file may lie elsewhere on another machine.
"""

import dataclasses
import hashlib
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import NAMED, TargetConfig
from megatron_dr.data.encode import FORMS
from megatron_dr.mcore.data.preparation import TOKENIZER_FILES
from megatron_dr.mcore.data.samples import MASK
from megatron_dr.mcore.loop import parts
from megatron_dr.version import VERSION

Record = dict[str, Any]

PLUGIN, PACKAGE = "plugin", "version of megatron_dr"
_GENERAL = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path",
            "per_split_data_args_path")  # fmt: skip
_SIZES = ("micro_batch_size", "global_batch_size", "seq_length", "seed", "calculate_per_token_loss")
_ENDINGS = [end + mask for end in dict.fromkeys(sum(FORMS.values(), ())) for mask in ("", MASK)]
_LARGE = 1 << 28  # bytes; of a larger file of the general role the size alone tells
# what is said, not what is done
_SAID = ("metrics", "log_blocks", "stall_seconds", "record", "record_every", "record_rows")
_LAYOUT = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
           "virtual_pipeline_model_parallel_size", "context_parallel_size",
           "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel",
           "use_distributed_optimizer", "train_iters", "save_interval", "eval_interval",
           "eval_iters", "finetune", "dr_changed_ok", "dr_record", "dr_record_every",
           "dr_record_rows")  # fmt: skip


def of(args: Namespace, configs: tuple[DRConfig, TargetConfig] | None, data: bool = True) -> Record:
    """Of Megatron's arguments, validated.

    Args:
        data: whether files are looked at.
    """
    if configs is None and not parts.on(args):
        return {PLUGIN: "off", PACKAGE: VERSION}
    found: Record = {PLUGIN: "on", PACKAGE: VERSION}
    for config in configs or ():
        found |= _fields("dr", config, data)
    for part, own in parts.on(args):
        if dataclasses.is_dataclass(own):
            found |= _fields(f"dr-{part.name}", own, data)
        for name in part.flags:
            found[name.removeprefix("--")] = _plain(getattr(args, _dest(name), None))
    found |= {_dashed(name): _plain(getattr(args, name, None)) for name in _SIZES}
    if data:
        found |= {_dashed(name): _general(getattr(args, name, None)) for name in _GENERAL}
        found["tokenizer-model"] = _tokenizer(getattr(args, "tokenizer_model", None))
    return found


def layout(args: Namespace) -> Record:
    """What all ranks must have alike, and a resumed run may have otherwise."""
    return {_dashed(name): _plain(getattr(args, name, None)) for name in _LAYOUT}


def _fields(prefix: str, config: Any, data: bool) -> Record:
    """Of a configuration's fields that have flags."""
    found: Record = {}
    for field in dataclasses.fields(config):
        if not field.metadata or field.name in _SAID:
            continue
        name, value = f"{prefix}-{_dashed(field.name)}", getattr(config, field.name)
        is_data = field.metadata["unit"] in ("path", "folder") and value is not None
        if isinstance(config, TargetConfig) and field.name in NAMED and isinstance(value, tuple):
            found |= _named(name, dict(value), is_data) if data or not is_data else {}
            continue
        value = _plain(value)
        if not is_data:
            found[name] = value
        elif data:
            found[name] = _content(value, whole=field.metadata["unit"] == "path")
    return found


def data_paths(args: Namespace, more: Iterable[str] = ()) -> list[Path]:
    """All files of the general data, and of more paths."""
    found = list(more)
    for name in _GENERAL:
        value = getattr(args, name, None) or []
        found += [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    return sorted({file for path in found for file in _files(path)})


def _named(name: str, values: dict[str, Any], is_data: bool) -> Record:
    """Of several sets: their names, and under FLAG:NAME what each has."""
    kept = {key: _content(one, whole=True) if is_data else one for key, one in values.items()}
    return {name: list(values), **{f"{name}:{key}": one for key, one in kept.items()}}


def _general(value: Any) -> Any:
    """Of a list of paths and weights, or of one path."""
    if isinstance(value, (list, tuple)):
        return [_content(str(one), whole=False) for one in value]
    return _plain(value) if value is None else _content(str(value), whole=False)


def _tokenizer(path: Any) -> Any:
    folder = Path(str(path))
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return _digest(files, whole=True) if files else _general(path)


def _content(path: str, whole: bool) -> str:
    """The content of a path as text; what is no path (a weight, a name), as it is.

    Args:
        whole: large files too.
    """
    files = _files(path)
    if not files:
        return f"no such data: {path}" if whole else path
    return _digest(files, whole)


def _digest(files: list[Path], whole: bool) -> str:
    digest, size = hashlib.sha256(), 0
    for file in files:
        try:
            length = file.stat().st_size
            digest.update(f"{length} ".encode())
            if whole or length <= _LARGE:
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{file}: can't be read ({error.strerror}).") from None
        size += length
    return f"{size:,} bytes, sha256 {digest.hexdigest()[:12]}"


def _files(path: str) -> list[Path]:
    """A file, all files of a folder, or those of an indexed dataset's prefix."""
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        return sorted(file for file in Path(path).rglob("*") if file.is_file())
    names = [Path(path + ending + suffix) for ending in _ENDINGS for suffix in (".idx", ".bin")]
    return [file for file in names if file.is_file()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
