"""Weights of Hugging Face: safetensors, their index, older pickles; planned and converted."""

import functools
import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_dr.hf import to_megatron
from tests.hf._convert import make

from ._cases import Raw, command, damaged, dumped, fuzzed, refused, trees

WEIGHTS, INDEX, PICKLE = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
)  # fmt: skip


@functools.cache
def base() -> tuple[bytes, dict[str, torch.Tensor]]:
    """config.json and the tensors of a small model."""
    with tempfile.TemporaryDirectory() as folder:
        values = make(Path(folder, "hf"))
        return Path(folder, "hf", "config.json").read_bytes(), values


@functools.cache
def saved() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_file(base()[1], Path(folder, WEIGHTS), metadata={"format": "pt"})
        return Path(folder, WEIGHTS).read_bytes()


@functools.cache
def pickled(old: bool) -> bytes:
    held = io.BytesIO()
    torch.save(base()[1], held, _use_new_zipfile_serialization=not old)
    return held.getvalue()


def headers() -> list[Any]:
    """The header of the safetensors file, as a table."""
    size = int.from_bytes(saved()[:8], "little")
    return [json.loads(saved()[8 : 8 + size])]


def with_header(header: Any) -> bytes:
    """The file with another header, of a length that is true."""
    text = dumped(header)
    size = int.from_bytes(saved()[:8], "little")
    return len(text).to_bytes(8, "little") + text + saved()[8 + size :]


def read(case: dict[str, bytes]) -> None:
    """Planned, and where that is possible written."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held, "hf")
        folder.mkdir()
        (folder / "config.json").write_bytes(base()[0])
        for name, content in case.items():
            (folder / name).write_bytes(content)

        def convert() -> None:
            plan = to_megatron.plan(folder, to_megatron.Layout(), allow_pickle=True)
            to_megatron.convert(plan, Path(held, "out"))

        if refused(convert, held):
            assert not [*Path(held).glob("out*")]
        shutil.rmtree(folder)


def _lying(size: int) -> bytes:
    return (size % 2**64).to_bytes(8, "little") + saved()[8:]


def _bomb() -> bytes:
    """A pickle's zip file whose tensors are 4 GB of zeros, packed in some kB."""
    held = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(pickled(False))) as old,
        zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            with new.open(name, "w") as file:
                if name.endswith("/data/0"):
                    for _ in range(256):
                        file.write(bytes(1 << 20))
                else:
                    file.write(old.read(name))
    return held.getvalue()


_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n"
_LISTED = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(["a", "b"], WEIGHTS)}


def _indexed(index: bytes) -> dict[str, bytes]:
    return {"a.safetensors": saved(), INDEX: index}


def _listed() -> dict[str, Any]:
    return {"metadata": {}, "weight_map": dict.fromkeys(base()[1], "a.safetensors")}


FAILED = [
    *({WEIGHTS: _lying(size)} for size in (0, 1, 2**31, 2**62, 2**63, 2**64 - 1)),
    {WEIGHTS: b""}, {PICKLE: b""}, {PICKLE: b"PK"}, {PICKLE: _bomb()},
    {WEIGHTS: saved()[:5000]}, {WEIGHTS: _LFS}, {PICKLE: _LFS},
    {WEIGHTS: saved(), INDEX: dumped(_LISTED)}, {PICKLE: pickled(True)},
    {WEIGHTS: saved(), "adapter_config.json": b"{}", "adapter_model.safetensors": b""},
    _indexed(b"{}"), _indexed(b"{oops"), _indexed(dumped({"weight_map": {"a": "../b"}})),
    _indexed(b"[" * 100_000), _indexed(dumped({"weight_map": {"a": "a.safetensors\0"}})),
    _indexed(dumped({"weight_map": Raw("[" * 2000 + "]" * 2000)})),
    _indexed(dumped({"weight_map": {"a": "x" * 5000}})),
]  # fmt: skip
_CASES = st.one_of(
    damaged([saved()]).map(lambda content: {WEIGHTS: content}),
    trees(headers()).map(lambda header: {WEIGHTS: with_header(header)}),
    damaged([pickled(False), pickled(True)]).map(lambda content: {PICKLE: content}),
    trees([_listed()]).map(lambda index: _indexed(dumped(index))),
    damaged([dumped(_listed())]).map(_indexed),
)
test_weights, test_weights_long = fuzzed(read, _CASES, 40, 2000, FAILED)


def converted(case: dict[str, bytes]) -> None:
    """By the command."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held, "hf")
        folder.mkdir()
        (folder / "config.json").write_bytes(case.get("config.json", base()[0]))
        (folder / WEIGHTS).write_bytes(case.get(WEIGHTS, saved()))
        command(["convert", "hf-to-mcore", str(folder), str(Path(held, "out"))], Path(held))


_COMMANDS = damaged([saved()]).map(lambda content: {WEIGHTS: content}) | trees(
    [json.loads(base()[0])]
).map(lambda table: {"config.json": dumped(table)})
test_command, test_command_long = fuzzed(converted, _COMMANDS, 15, 400)
