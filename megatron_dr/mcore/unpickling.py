"""Checkpoints that Megatron loads, read without running what their pickles name.

Megatron leaves a torch_dist checkpoint's `.metadata` and its objects (arguments, random state, the
optimizer's numbers) to torch.distributed.checkpoint, which reads them with pickle, code and all.
Here both are replaced by megatron_dr/hf/unpickling.py for the whole process. What objects may have
is what torch's `weights_only` reader takes, and Megatron's own list beside it
(megatron.core.safe_globals), which torch's `add_safe_globals` can make longer.
"""

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_dr.hf.from_megatron import checkpoint_folder
from megatron_dr.hf.torch_dist import Reader
from megatron_dr.hf.unpickling import Known, read_known, read_metadata

# Megatron's list has the one that the installed numpy has.
_RECONSTRUCT = numpy.zeros(0).__reduce__()[0]
_NUMPY: list[Known] = [
    (_RECONSTRUCT, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")
]


def restrict() -> None:
    """Replace both readers of torch.distributed.checkpoint. Idempotent."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(self: FileSystemReader, *_: Any, **kwargs: Any) -> Metadata:
    rank = kwargs.get("rank")
    name = ".metadata" if rank is None else f"__{rank}.metadata"
    found = read_metadata(Path(self.path) / name, checked=True)
    if getattr(found, "storage_meta", None) is None:
        found.storage_meta = StorageMeta()
    assert found.storage_meta is not None
    for one in found.state_dict_metadata.values():
        # torch 2.15 notes them; Megatron 0.19 hands all properties to torch.empty
        vars(getattr(one, "properties", one)).pop("strides", None)
    found.storage_meta.load_id = self.load_id
    return found


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    name = read_item.dest_index.fqn
    found = read_known(value, name, _NUMPY)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], found)
    else:
        self.state_dict[name] = found


def check(folder: Path) -> None:
    """That a torch_dist checkpoint is whole, as far as can be seen without its tensors.

    Raises:
        ValueError: a file that is damaged or not there, or names what could run code.
    """
    if not all((folder / name).exists() for name in (".metadata", "metadata.json")):
        return  # none, or of another format
    reader = Reader(folder)
    reader.common()
    reader.check_objects(_NUMPY)


def check_loaded(args: Namespace) -> None:
    """`check` the checkpoints that a run's flags load.

    Raises:
        ValueError: as `check`, or a tracker that names none.
    """
    for path in filter(None, (args.load, args.pretrained_checkpoint)):
        step = getattr(args, "ckpt_step", None)
        check(Path(path) / f"iter_{step:07d}" if step else checkpoint_folder(Path(path)))
