"""Flags that need another flag or a package: refused without it, and what they do with it."""

import argparse
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.mcore import compat
from megatron_dr.mcore.loop import needed, script_flags
from megatron_dr.mcore.refuse import refuse
from megatron_dr.report import metrics

from ._train import cone, data, flags, run

__all__ = ["data"]

IN_BACKGROUND = "--async-save --use-persistent-ckpt-worker"
LOGGED = "--tensorboard-dir a --wandb-project b --wandb-exp-name c"
BAD = {
    "worker": ("--async-save", "--async-save has no effect without --use-persistent-ckpt-worker"),
    "save": ("--use-persistent-ckpt-worker", "has no effect without --async-save: give both"),
    "nvrx": (IN_BACKGROUND, "--async-save needs the package nvidia-resiliency-ext 0.6 or newer"),
    "legacy": (f"{IN_BACKGROUND} --async-strategy mcore --ckpt-format torch",
               "--async-save does not go with --ckpt-format torch: give --ckpt-format torch_dist."),
    "local": ("--non-persistent-ckpt-type local", "local needs the package nvidia-resiliency-ext"),
    "ft": ("--enable-ft-package", "--enable-ft-package: no run of the plugin was tried under ft_l"),
    "timeouts": ("--calc-ft-timeouts", "has no effect without --enable-ft-package"),
    "faults": ("--fault-injector-num-ranks 1", "needs the package nvidia-resiliency-ext: install"),
    "board": ("--tensorboard-dir a", "--tensorboard-dir needs the package tensorboard: install"),
    "wandb": (f"{LOGGED} --save a", "--wandb-project needs the package wandb: install it, or drop"),
    "board of wandb": ("--wandb-project a --wandb-exp-name b", "no effect without --tensorboard-d"),
    "name": ("--tensorboard-dir a --wandb-project b", "has no effect without --wandb-exp-name"),
    "folder": (LOGGED, "--wandb-project needs a folder: give --wandb-save-dir, or --save."),
    "project": ("--wandb-entity a", "--wandb-entity has no effect without --wandb-project"),
    "inspector": ("--run-workload-inspector-server", "needs the package workload_inspector"),
    "autoresume": ("--adlr-autoresume", "--adlr-autoresume needs NVIDIA's userlib, which is not"),
}  # fmt: skip
MISSING = {"board": "tensorboard", "wandb": "wandb"}  # others are not installed for tests


@pytest.mark.parametrize("name", BAD)
def test_what_would_have_no_effect_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given, sentence = BAD[name]
    stock, missing = needed.find_spec, (MISSING.get(name), "nvidia_resiliency_ext")
    monkeypatch.setattr(needed, "find_spec", lambda m: None if m in missing else stock(m))
    monkeypatch.setattr(needed, "_cannot_save", lambda: True)
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(given.split())
    with pytest.raises(ValueError, match="^--[a-z-]+:? .*[.]$") as refused:
        refuse("", needed.RULES, args)
    assert sentence in str(refused.value)


def test_a_restart_in_the_process_is_refused_in_any_script() -> None:
    """Megatron's own script wraps its training for it; with our entry nothing would."""
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(["--inprocess-restart"])
    with pytest.raises(ValueError, match="^x --inprocess-restart .it starts a run again in a proc"):
        refuse("x", compat.REFUSED, args)
    assert script_flags.reason("--inprocess-restart") is not None


def test_what_can_be_done_is_not_refused() -> None:
    parse = add_megatron_arguments(argparse.ArgumentParser()).parse_args
    for given in ("", f"{IN_BACKGROUND} --async-strategy mcore", f"{LOGGED} --save d"):
        refuse("", needed.RULES, parse(given.split()))


def test_every_rank_hears_it_before_the_model_is_built(data: dict[str, str]) -> None:
    """With the plugin's flags and without; Megatron's last rank alone would end, or none."""
    for more in ("", cone(data)):
        found = run(flags(data, f"{more} --wandb-project p"))
        assert [code for code, _, _ in found] == [2, 2]
        assert "error: --wandb-project has no effect without --tensorboard-dir" in found[0][2]


@pytest.mark.soak  # W&B starts a service of its own
def test_what_tensorboard_shows_wandb_has_too(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Megatron, of the plugin, and of each block."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    path = tmp_path / "m.jsonl"
    more = f"""{cone(data)} --dr-log-blocks --eval-iters 1 --eval-interval 2 --dr-metrics {path}
        --tensorboard-dir {tmp_path} --wandb-project p --wandb-exp-name e
        --wandb-save-dir {tmp_path}"""
    code, _, error = run(flags(data, more, 2))[1]
    assert code == 0, error
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found: dict[int, dict[str, float]] = {}
    for step, values in history(file):
        found.setdefault(step, {}).update(values)
    assert "lm loss validation" in found[2] and "target loss validation" in found[2]
    for line in metrics.read(path, "train"):
        values = found[line["iteration"]]
        for name in ("lm loss", "target loss", "dr cos update", "dr rows"):
            assert values[name] == pytest.approx(line[name], rel=1e-5)
        assert values["dr cos update/model"] == pytest.approx(line["dr cos update"], rel=1e-5)


def history(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and values of what W&B keeps of a run: records in the format of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if at % 32768 > 32768 - 7:  # the rest of a block has no room for a header
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            said = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if said.WhichOneof("record_type") == "history":
                items = said.history.item
                values = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                yield said.history.step.num or int(values["_step"]), values
