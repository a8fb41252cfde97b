"""What Megatron's own loading unpickles: its states, and nothing that runs code."""

import io
import os
import pickle
import random
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode, RerunState
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from megatron_dr.hf import to_megatron, torch_dist
from megatron_dr.mcore import unpickling
from tests.hf._convert import make, run

STATES = {
    "random": {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    },
    "rerun": {"mode": RerunMode.DISABLED, "state": RerunState.NOT_RUNNING_YET},
    "arguments": Namespace(model_type=ModelType.encoder_or_decoder, path=Path("x"), size=(1, 2)),
    "extra state": io.BytesIO(b"x"),
    "plain": {"steps": 3, "rate": 1e-3, "none": None, "flags": {"a"}},
}


def read(data: bytes) -> Any:
    """As torch.distributed.checkpoint reads an object."""
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    index = MetadataIndex("key")
    size = torch.Size((0,))
    item = ReadItem(LoadItemType.BYTE_IO, index, size, index, size, size)
    planner.load_bytes(item, io.BytesIO(data))
    return planner.state_dict["key"]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_megatrons_states_are_read(state: Any) -> None:
    unpickling.restrict()
    file = io.BytesIO()
    torch.save([state], file)
    found = read(file.getvalue())[0]
    assert type(found) is type(state)
    assert found.getvalue() == b"x" if isinstance(state, io.BytesIO) else str(found) == str(state)


class Boom:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_what_runs_code_is_refused(tmp_path: Path) -> None:
    """Metadata, an object and the arguments; the first two by torch's own functions too."""
    unpickling.restrict()
    bad, ran = Boom(tmp_path / "ran"), tmp_path / "ran"
    file = io.BytesIO()
    torch.save([bad], file)
    with pytest.raises(ValueError, match="key: it names posix.system, which no checkpoint"):
        read(file.getvalue())
    make(tmp_path / "hf")
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore") == 0
    release = tmp_path / "mcore" / "release"
    args = Namespace(load=str(tmp_path / "mcore"), pretrained_checkpoint=None)
    unpickling.check_loaded(args)
    good = FileSystemReader(release).read_metadata()
    assert good.storage_meta is not None and good.storage_meta.load_id
    chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((2,)))
    written = TensorWriteData(chunk, TensorProperties(torch.bfloat16), torch.Size((2,)))
    item = WriteItem(MetadataIndex("key"), WriteItemType.SHARD, tensor_data=written)
    good.all_local_plans = [SavePlan([item], _StoragePrefix("__0_"))]  # type: ignore[attr-defined]
    (release / ".metadata").write_bytes(pickle.dumps(good))
    found: Any = FileSystemReader(release).read_metadata()
    assert found.all_local_plans[0].items == [item]  # as Megatron's own saves have it
    unpickling.check_loaded(args)
    (release / ".metadata").write_bytes(pickle.dumps(bad))
    for read_it in (FileSystemReader(release).read_metadata, lambda: unpickling.check_loaded(args)):
        with pytest.raises(ValueError, match="metadata: it names posix.system"):
            read_it()
    (release / "metadata.json").unlink()
    unpickling.check_loaded(args)  # of another format: left to its reader, which refuses as well
    shutil.rmtree(release)
    plan = to_megatron.plan(tmp_path / "hf", to_megatron.Layout())
    objects = {"rng_state/shard_0_1": bad}
    common = to_megatron.common_state(plan)
    torch_dist.write(release, list(plan.pieces((0, 0, 0))), objects, common)
    with pytest.raises(ValueError, match=r"distcp, rng_state/shard_0_1: it names posix.system"):
        unpickling.check_loaded(args)
    assert not ran.exists()
