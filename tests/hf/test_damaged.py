"""Damaged and crafted inputs: a sentence with the file, exit code 2, nothing left, no code run."""

import enum
import json
import os
import pickle
import resource
import shutil
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dr.hf import to_megatron, torch_dist
from megatron_dr.hf.unpickling import read_metadata

from ._convert import make, run

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
INDEX, WEIGHTS, PICKLE = "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ in one file, shards/ in one with an index, pickle/, and mcore/."""
    folder = tmp_path_factory.mktemp("whole")
    values = make(folder / "hf")
    assert run("hf-to-mcore", folder / "hf", folder / "mcore") == 0
    for name in ("shards", "pickle"):
        shutil.copytree(folder / "hf", folder / name)
        (folder / name / WEIGHTS).unlink()
    save_file(values, folder / "shards" / "a.safetensors")
    index = {"weight_map": dict.fromkeys(values, "a.safetensors")}
    (folder / "shards" / INDEX).write_text(json.dumps(index))
    torch.save(values, folder / "pickle" / PICKLE)
    return folder


def cut(size: int) -> Callable[[bytes], bytes]:
    return lambda found: found[:size]


def text(said: str) -> Callable[[bytes], bytes]:
    return lambda _: said.encode()


def config(**values: Any) -> Callable[[bytes], bytes]:
    return lambda found: json.dumps(json.loads(found) | values).encode()


def saved(what: Any, **more: Any) -> Callable[[bytes], bytes]:
    def change(_: bytes) -> bytes:
        torch.save(what, "saved.pt", **more)
        return Path("saved.pt").read_bytes()

    return change


FROM_HF = {
    "weights cut": ("hf", WEIGHTS, cut(1500), "damaged, or the rest of it is missing"),
    "weights empty": ("hf", WEIGHTS, cut(0), "damaged, or the rest of it is missing"),
    "weights a pointer": ("hf", WEIGHTS, text(LFS), "a pointer of Git LFS"),
    "shard cut": ("shards", "a.safetensors", cut(1500), "damaged, or the rest of it is missing"),
    "shard a pointer": ("shards", "a.safetensors", text(LFS), "a pointer of Git LFS"),
    "index no JSON": ("shards", INDEX, text("{oops"), "damaged, no index of weights"),
    "index a list": ("shards", INDEX, text("[]"), "damaged, no index of weights"),
    "index without map": ("shards", INDEX, text("{}"), "damaged, no index of weights"),
    "index empty": ("shards", INDEX, text('{"weight_map": {}}'), "weight_map is empty"),
    "index leaves": ("shards", INDEX, text('{"weight_map": {"a": "../b"}}'), "no file of the"),
    "index absolute": ("shards", INDEX, text('{"weight_map": {"a": "/etc/b"}}'), "no file of the"),
    "index upwards": ("shards", INDEX, text('{"weight_map": {"a": ".."}}'), "no file of the"),
    "index wrong": (
        "shards", INDEX, text('{"weight_map": {"zz": "a.safetensors"}}'),
        "it places zz in a.safetensors, which doesn't have it",
    ),
    "pickle cut": ("pickle", PICKLE, cut(900), "damaged, or the rest of it is missing"),
    "pickle a list": ("pickle", PICKLE, saved([1]), "no dictionary of tensors"),
    "pickle wrapped": ("pickle", PICKLE, saved({"model": {}}), "'model' is no tensor"),
    "config a list": ("hf", "config.json", text("[]"), "no table of names and values"),
    "config cut": ("hf", "config.json", cut(40), "not JSON"),
    "text for a size": ("hf", "config.json", config(hidden_size="16"), "'hidden_size' is '16'"),
    "negative": ("hf", "config.json", config(num_attention_heads=-4), "'num_attention_heads' is"),
    "endless": ("hf", "config.json", config(num_hidden_layers=10**30), "can't be meant"),
    "half": ("hf", "config.json", config(vocab_size=7.5), "'vocab_size' is '7.5'"),
    "not finite": ("hf", "config.json", config(rms_norm_eps=float("nan")), "'rms_norm_eps' is"),
    "text for a switch": (
        "hf", "config.json", config(tie_word_embeddings="false"), "must be true or false",
    ),
    "rope a list": ("hf", "config.json", config(rope_scaling=[]), "'rope_scaling' is '[]'"),
    "rope theta": ("hf", "config.json", config(rope_theta="1e4"), "'rope_theta' is '1e4'"),
    "linear 2.5": (
        "hf", "config.json", config(rope_scaling={"type": "linear", "factor": 2.5}),
        "2.5 is no integer",
    ),
    "linear 0": (
        "hf", "config.json", config(rope_scaling={"type": "linear", "factor": 0}), "'factor' is '0'"
    ),
    "theta 10000.5": ("hf", "config.json", config(rope_theta=10000.5), "10000.5 is no integer"),
    "tokenizer cut": ("hf", "tokenizer.json", text('{"model"'), "damaged, not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("place, file, change, sentence", FROM_HF.values(), ids=FROM_HF.keys())
def test_damaged_hugging_face(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, place: str, file: str, change: Any, sentence: str,
) -> None:  # fmt: skip
    """Refused before anything is written or a plan is printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / place, tmp_path / "hf")
    path = tmp_path / "hf" / file
    path.write_bytes(change(path.read_bytes()))
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "out", "--allow-pickle") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert str(path) in said.err and sentence in said.err
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["../a", "/etc/hostname", ".."])
def test_places_outside_of_the_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(whole / "mcore", tmp_path / "mcore")
    metadata = read_metadata(tmp_path / "mcore" / METADATA)
    for place in metadata.storage_data.values():
        place.relative_path = name
    (tmp_path / "mcore" / METADATA).write_bytes(pickle.dumps(metadata))
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 2
    assert f"lies in {name!r}, no file of the folder" in capsys.readouterr().err


LINKED = {
    "weights": ("hf", WEIGHTS), "a shard": ("shards", "a.safetensors"), "index": ("shards", INDEX),
    "configuration": ("hf", "config.json"), "what is copied": ("hf", "notes.txt"),
    "a pickle": ("pickle", PICKLE), "a template": ("hf", "additional_chat_templates/a.jinja"),
    "pieces": ("mcore", "release/__0_0.distcp"), "Megatron's": ("mcore", "hf/tokenizer.json"),
}  # fmt: skip


@pytest.mark.parametrize("place, file", LINKED.values(), ids=LINKED.keys())
def test_links_out_of_the_folder(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, file: str
) -> None:
    """What is copied may be published: a crafted folder names no file of the user's."""
    shutil.copytree(whole / place, tmp_path / "given")
    path, private = tmp_path / "given" / file, tmp_path / "private"
    if path.exists():
        path.rename(private)
    else:
        private.write_text("{}")
        path.parent.mkdir(exist_ok=True)
    path.symlink_to("../" * (file.count("/") + 1) + "private")
    into = ("mcore-to-hf",) if place == "mcore" else ("hf-to-mcore", "--allow-pickle")
    assert run(into[0], tmp_path / "given", tmp_path / "out", *into[1:]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert f"{path}: a link out of its folder, to {private}" in said.err
    assert not list(tmp_path.glob("out*"))


def test_links_inside_the_folder_are_followed(whole: Path, tmp_path: Path) -> None:
    """Also those of the hub's cache, whose files lie beside its folders."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0a1b"
    shutil.copytree(whole / "hf", folder)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (folder / WEIGHTS).rename(folder / "../../blobs/0")
    (folder / WEIGHTS).symlink_to("../../blobs/0")
    (folder / "config.json").rename(folder / "kept")
    (folder / "config.json").symlink_to("kept")
    assert run("hf-to-mcore", folder, tmp_path / "mcore") == 0


def test_pickles_of_old_torch_are_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "pickle", tmp_path / "hf")
    values = load_file(whole / "hf" / WEIGHTS)
    torch.save(values, tmp_path / "hf" / PICKLE, _use_new_zipfile_serialization=False)
    assert run("hf-to-mcore", tmp_path / "hf", tmp_path / "mcore", "--allow-pickle") == 0
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "back") == 0
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert all(back[name].equal(value) for name, value in values.items())


DISTCP, METADATA = "release/__0_0.distcp", "release/.metadata"
TRACKER = "latest_checkpointed_iteration.txt"
FROM_MEGATRON = {
    "pieces cut": (DISTCP, cut(3000), "cut short, 3000 bytes"),
    "pieces a pointer": (DISTCP, text(LFS), "cut short"),
    "pieces of zeros": (DISTCP, lambda found: bytes(len(found)), "damaged"),
    "metadata cut": (METADATA, cut(1000), "damaged, no metadata"),
    "metadata empty": (METADATA, cut(0), "damaged, no metadata"),
    "metadata a number": (METADATA, lambda _: pickle.dumps(3), "damaged, no metadata"),
    "tracker": (TRACKER, text("x"), "'x' is no iteration"),
    "config": ("hf/config.json", config(num_hidden_layers="2"), "'num_hidden_layers' is '2'"),
}


@pytest.mark.parametrize("file, change, sentence", FROM_MEGATRON.values(), ids=FROM_MEGATRON)
def test_damaged_megatron(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, change: Any,
    sentence: str,
) -> None:  # fmt: skip
    shutil.copytree(whole / "mcore", tmp_path / "mcore")
    path = tmp_path / "mcore" / file
    path.write_bytes(change(path.read_bytes()))
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert str(path) in said and sentence in said and said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_pieces_damaged_where_only_reading_finds_it(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left of what was written until then."""
    shutil.copytree(whole / "mcore", tmp_path / "mcore")
    reader = torch_dist.Reader(tmp_path / "mcore" / "release")
    place = max(reader.storage.storage_data.values(), key=lambda place: place.offset)
    with open(tmp_path / "mcore" / DISTCP, "r+b") as file:
        file.seek(place.offset)
        file.write(bytes(place.length))
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "written as" in said.out  # the plan found nothing wrong
    assert f"{tmp_path / 'mcore' / DISTCP}: damaged, " in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_of_which_a_part_is_missing(whole: Path, tmp_path: Path) -> None:
    """What no file holds would be what the memory has."""
    reader = torch_dist.Reader(whole / "mcore" / "release")
    key = "decoder.layers.mlp.linear_fc2.weight"
    reader.tensors[key].chunks.pop()
    shape = tuple(reader.tensors[key].size)[1:]
    reader.read(key, (0,), shape)
    with pytest.raises(ValueError, match=f"parts of tensor {key} are missing"):
        reader.read(key, (1,), shape)


def test_a_damaged_number_does_not_fill_the_memory(tmp_path: Path) -> None:
    """A place of 2^26 in the memory of what was read: Python's own unpickler makes room for it."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04]r\x00\x00\x00\x04.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="damaged, no metadata"):
        read_metadata(tmp_path / ".metadata")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def crafted(marker: Path) -> dict[str, Call]:
    command = f"touch {marker}"
    return {
        "posix.system": Call(os.system, command),
        "builtins.exec": Call(exec, f"open({str(marker)!r}, 'w')"),
        "builtins.getattr": Call(getattr, Path, "home"),
        "torch.save": Call(torch.save, 1, str(marker)),
    }


NAMES = list(crafted(Path()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("within", [False, True], ids=["alone", "in a description"])
def test_crafted_metadata(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, within: bool
) -> None:
    """Refused by the name that it calls, also deep in an otherwise good description."""
    shutil.copytree(whole / "mcore", tmp_path / "mcore")
    path = tmp_path / "mcore" / METADATA
    metadata: Any = crafted(tmp_path / "ran")[name]
    if within:
        metadata, bad = read_metadata(path), metadata
        metadata.planner_data = {"a": [bad]}
    path.write_bytes(pickle.dumps(metadata))
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert f"{path}: it names " in said and "could run code: it is not read" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "builtins.getattr"])
@pytest.mark.parametrize("old", [False, True], ids=["0.19", "before"])
def test_crafted_common_state(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, old: bool
) -> None:
    """In the checkpoint's object, or in the file that it was before megatron.core 0.19."""
    shutil.copytree(whole / "mcore", tmp_path / "mcore")
    plan = to_megatron.plan(whole / "hf", to_megatron.Layout())
    common = to_megatron.common_state(plan)
    args = Namespace(**vars(common["args"]), extra=crafted(tmp_path / "ran")[name])
    release = tmp_path / "mcore" / "release"
    if old:
        torch.save(common | {"args": args}, release / "common.pt")
    else:
        shutil.rmtree(release)
        torch_dist.write(release, list(plan.pieces((0, 0, 0))), {}, common | {"args": args})
    assert run("mcore-to-hf", tmp_path / "mcore", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "it names " in said and name.split(".")[1] in said and said.count("\n") == 1
    assert not (tmp_path / "ran").exists() and not list(tmp_path.glob("out*"))


def test_classes_of_megatron_are_not_needed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object of one in the arguments becomes a stand-in, on which no code of it runs."""
    module = types.ModuleType("megatron.made_up")
    kind = enum.Enum("kind", {"one": 1}, module="megatron.made_up")
    module.kind = kind  # type: ignore[attr-defined]
    plan = to_megatron.plan(whole / "hf", to_megatron.Layout())
    common = to_megatron.common_state(plan)
    common["args"] = Namespace(**vars(common["args"]), kind=kind(1), path=Path("y"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "megatron.made_up", module)
        torch_dist.write(tmp_path / "release", list(plan.pieces((0, 0, 0))), {}, common)
    found = torch_dist.Reader(tmp_path / "release").arguments()
    assert found["num_layers"] == 2
    assert type(found["kind"]).__name__ == "_Unknown" and found["path"] is not None
