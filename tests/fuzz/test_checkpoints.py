"""Checkpoints of Megatron: `.metadata`, `.distcp`, the common state, the tracker; exported."""

import functools
import io
import os
import pickle
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from megatron_dr.hf import adapters, from_megatron
from megatron_dr.hf.torch_dist import Reader
from tests.hf._convert import make, run

from ._cases import SCALARS, VALUES, command, damaged, fuzzed, refused


@functools.cache
def folder() -> dict[str, bytes]:
    """The files of a converted checkpoint, by path."""
    with tempfile.TemporaryDirectory() as held:
        make(Path(held, "hf"))
        assert run("hf-to-mcore", Path(held, "hf"), Path(held, "out")) == 0
        out = Path(held, "out")
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


META, STATE, TRACKER = "release/.metadata", "release/metadata.json", from_megatron.TRACKER
DATA = "release/__0_0.distcp"


def laid(held: str, changed: dict[str, Any]) -> Path:
    """The checkpoint in a folder, some of its files changed; None leaves one out."""
    out = Path(held, "checkpoint")
    for name, content in {**folder(), **changed}.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content is not None:
            path.write_bytes(content)
    return out


def read(case: dict[str, Any]) -> None:
    """Planned, and where that is possible exported."""
    with tempfile.TemporaryDirectory() as held:
        out = laid(held, case)

        def export() -> None:
            found = from_megatron.plan(out)
            adapters.find(found.reader)
            from_megatron.convert(found, Path(held, "hf"))

        if refused(export):
            assert not [*Path(held).glob("hf*")]


FAILED: list[dict[str, Any]] = [
    *({name: what} for name in (META, STATE, TRACKER, "hf/config.json")
      for what in ("pipe", "folder")),
    {TRACKER: b"9" * 5000}, {TRACKER: b"\xff\xfe"}, {TRACKER: b""}, {"release/common.pt": "pipe"},
    {DATA: folder()[DATA][:300]}, {META: folder()[META][:100]},
    {META: b"cos\nsystem\n(S'true'\ntR."}, {DATA: "pipe"}, {META: b""},
    {META: pickle.dumps([1])}, {DATA: None}, {META: None},
]  # fmt: skip
_CASES = st.one_of(
    damaged([folder()[META]]).map(lambda content: {META: content}),
    damaged([folder()[DATA]]).map(lambda content: {DATA: content}),
    damaged([folder()[TRACKER]]).map(lambda content: {TRACKER: content}),
    damaged([folder()[STATE]]).map(lambda content: {STATE: content}),
)
test_files, test_files_long = fuzzed(read, _CASES, 30, 2000, FAILED)


@functools.cache
def common() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as held:
        return Reader(laid(held, {}) / "release").common()


def _object(value: Any) -> bytes:
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


@st.composite
def states(draw: Any) -> Any:
    """The common state with arguments of other types."""
    state = dict(common())
    for _ in range(draw(st.integers(1, 3))):
        value = draw(st.one_of(
            SCALARS, VALUES,
            st.sampled_from([torch.zeros(2), torch.tensor(float("nan")), {1, 2}, (1,), b"x",
                             torch.bfloat16, Namespace(a=1)]),
        ))  # fmt: skip
        where = draw(st.sampled_from(["state", "args", "args", "args", "lora"]))
        if where == "state":
            state[draw(st.sampled_from([*state, "x"]))] = value
        elif isinstance(state.get("args"), Namespace):
            names = sorted(vars(state["args"]))
            if where == "lora":
                names = ["dr_lora_rank", "dr_lora_alpha", "load", "pretrained_checkpoint"]
            new = {draw(st.sampled_from(names)): value}
            state["args"] = Namespace(**{**vars(state["args"]), **new})
    return state


def read_state(case: Any) -> None:
    """As older checkpoints have it, in common.pt."""
    content = case if isinstance(case, bytes) else _object(case)
    with tempfile.TemporaryDirectory() as held:
        out = laid(held, {"release/common.pt": content})
        refused(lambda: from_megatron.plan(out))


def _with(**args: Any) -> dict[str, Any]:
    return common() | {"args": Namespace(**{**vars(common()["args"]), **args})}


FAILED_STATES: list[Any] = [
    _with(num_layers=torch.zeros(2)), _with(num_layers=Namespace(a=1)), _object([1]), b"",
    common() | {"args": 5}, common() | {"args": None}, _with(load="\0"), _with(load="x" * 5000),
]  # fmt: skip
test_state, test_state_long = fuzzed(
    read_state, states() | damaged([_object(common())]), 40, 2000, FAILED_STATES
)


def find_alpha(case: Any) -> None:
    """Adapters' rank and alpha, which the arguments say."""

    class Stored:
        folder = Path("here")
        tensors = {"x.lora_a.weight": Namespace(size=torch.Size((2, 4)))}

        def arguments(self) -> dict[str, Any]:
            return case if isinstance(case, dict) else {}

    def find() -> None:
        found = adapters.find(Stored())  # type: ignore[arg-type]
        assert found is not None
        assert isinstance(found.alpha, float)

    refused(find)


_ALPHAS = st.fixed_dictionaries({"dr_lora_rank": SCALARS, "dr_lora_alpha": SCALARS | VALUES})
test_alpha, test_alpha_long = fuzzed(
    find_alpha, _ALPHAS, 20, 300, [{"dr_lora_rank": 2, "dr_lora_alpha": "8"}]
)


def exported(case: dict[str, Any]) -> None:
    """By the command."""
    with tempfile.TemporaryDirectory() as held:
        out = laid(held, case)
        command(["convert", "mcore-to-hf", str(out), str(Path(held, "hf"))], Path(held))
        shutil.rmtree(out)


test_command, test_command_long = fuzzed(exported, _CASES, 10, 300)
