"""A resume with other flags or data than the checkpoint's run: said line by line, or refused."""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.mcore.loop import changes, record
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args

from ._train import data, flags, run, unjudged

__all__ = ["data"]


def started(*given: str, trained: int = 8) -> Namespace:
    """Arguments as they are checked when a run begins."""
    args = add_arguments(add_megatron_arguments(ArgumentParser())).parse_args(given)
    args.load, args.consumed_train_samples = "saved", trained
    setattr(args, changes.ATTRIBUTE, record.of(args, configs_from_args(args)))
    return args


@pytest.fixture
def target(tmp_path: Path) -> str:
    path = tmp_path / "target.jsonl"
    path.write_text('{"text": "one"}\n')
    return str(path)


PLUGIN = "--dr-target-data {target} --dr-slots 2"
REFUSED = {
    "target": ("{plugin}", "--dr-target-data {other}", "dr-target-data", "its place in that data"),
    "one of several targets": (
        "--dr-target-data law={target} med={target}", "--dr-target-data law={target} med={other}",
        "dr-target-data:med", "had --dr-target-data med 16 bytes, sha256",
    ),
    "their names": (
        "--dr-target-data law={target} med={target}", "--dr-target-data law={target} nat={other}",
        "dr-target-data", "had --dr-target-data law med, and this one has law nat",
    ),
    "a name": (PLUGIN, "--dr-target-data law={target}", "dr-target-data", "its place in that data"),
    "off": ("{plugin}", "", "plugin", "what it has learnt and gathered by it would be lost"),
    "a part off": ("{plugin} --dr-lora-rank 4", "{plugin}", "dr-lora-rank", "would be lost"),
    "set off": ("{plugin} --dr-lora-rank 4", "--dr-lora-rank 4", "dr-set", "would be lost"),
    "adapters": ("--dr-lora-rank 4", "--dr-lora-rank 8", "dr-lora-rank", "adapters are of that"),
    "subspaces": ("--dr-meso-size 8 --dr-set mean", "--dr-meso-size 8 --dr-meso-refresh 9 "
                  "--dr-set mean", "dr-meso-refresh", "its moments are of that space"),
    "packs": ("{plugin}", "{plugin} --dr-pack", "dr-pack", "count packs, or samples"),
}  # fmt: skip


@pytest.mark.parametrize("before, after, name, why", REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_go_on_is_refused_unless_it_is_meant(
    target: str, tmp_path: Path, before: str, after: str, name: str, why: str
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "two"}\n')
    plugin = PLUGIN.format(target=target)
    then, now = (
        started(*line.format(plugin=plugin, target=target, other=other).split())
        for line in (before, after)
    )
    with pytest.raises(ValueError, match="^saved: the checkpoint's run had ") as error:
        changes.check(now, then, speak=False)
    assert why in str(error.value) and f"--dr-changed-ok {name}, or " in str(error.value)
    now.dr_changed_ok = [name]
    changes.check(now, then, speak=False)
    now.dr_changed_ok = ["dr-nothing"]
    with pytest.raises(ValueError, match="--dr-changed-ok dr-nothing: no flag of this run"):
        changes.check(now, then, speak=False)


@pytest.mark.parametrize(
    "before, after, said",
    [
        ("{plugin} --dr-pack", "--dr-generate {target}", None),
        ("--dr-target-data {target} --dr-dpo-beta 1", "", None),
        ("--dr-set mean --dr-meso-size 8", "", None),
        ("--dr-lora-rank 4", "--dr-lora-rank 4", None),
        ("--dr-lora-rank 4", "", "had the plugin on, and this one has off, but what is evaluated"),
        ("{plugin} --dr-lora-rank 4", "--dr-generate {target}", "dr-lora-rank 4, and this one has"),
        ("--dr-lora-rank 4", "--dr-lora-rank 4 --dr-lora-alpha 2", "--dr-lora-alpha 16.0, and"),
    ],
)
def test_without_training_the_model_alone_has_to_be_the_same(
    target: str, before: str, after: str, said: str | None
) -> None:
    then, now = (
        started(*line.format(plugin=PLUGIN.format(target=target), target=target).split(), *more)
        for line, more in ((before, ()), (after, ("--skip-train",)))
    )
    if said is None:
        changes.check(now, then, speak=True)
    else:
        with pytest.raises(ValueError, match=said):
            changes.check(now, then, speak=True)


def test_what_has_not_changed_is_not_refused(target: str, tmp_path: Path) -> None:
    """Data that lie elsewhere, and a checkpoint before the first step."""
    other = tmp_path / "moved.jsonl"
    other.write_bytes(Path(target).read_bytes())
    then = started("--dr-target-data", target)
    changes.check(started("--dr-target-data", str(other), "--dr-set", "cone"), then, speak=False)
    changes.check(started(), started("--dr-target-data", target, trained=0), speak=False)


@pytest.mark.parametrize("kept", [5, [], {}, {3: "a"}, {"plugin": "on", 3: 4}, "plugin"])
def test_a_damaged_record_is_refused(kept: object) -> None:
    then = started()
    setattr(then, changes.ATTRIBUTE, kept)
    with pytest.raises(ValueError, match="the checkpoint's common state is damaged"):
        changes.check(started(), then, speak=False)


def test_a_checkpoint_of_an_older_version_is_asked_for_its_flags(target: str) -> None:
    same = ("--dr-target-data", target, "--dr-lora-rank")
    then = started(*same, "4")
    delattr(then, changes.ATTRIBUTE)
    changes.check(started(*same, "4"), then, speak=False)
    with pytest.raises(ValueError, match="--dr-lora-rank 4, and this one has 8"):
        changes.check(started(*same, "8"), then, speak=False)


def test_a_resume_says_what_changed(data: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    common = f"--eval-iters 0 --save {folder} --save-interval 2"
    assert run(flags(data, f"{unjudged(data)} {common} --exit-interval 2", 4), 1)[0][0] == 0
    other = unjudged(data).replace(data["target"], data["held_out"])
    changed = f"""{other} --dr-slots 4 --dr-set span --dr-alpha 0.9 {common} --load {folder}"""
    code, _, error = run(flags(data, changed, 4), 1)[0]
    assert code == 2 and "the checkpoint's run had --dr-target-data " in error
    code, out, error = run(flags(data, f"{changed} --dr-changed-ok dr-target-data", 4), 1)[0]
    assert code == 0, error
    said = re.findall(r"megatron_dr: resumed with --(\S+) (.*); the checkpoint's run had (.*)", out)
    found = {name: (new, old) for name, new, old in said}
    assert "bytes, sha256" in found.pop("dr-target-data")[1]
    assert found == {
        "dr-slots": ("4", "2"),
        "dr-set": ("span", "cone"),
        "dr-alpha": ("0.9", "0.05"),
        "dr-alpha-style": ("constant", "auto"),
    }
    assert "iteration        4/" in out
