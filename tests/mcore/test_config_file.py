"""--dr-config: the plugin's flags in a YAML file."""

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.mcore import cpu
from megatron_dr.mcore.loop import config_file, plan_flags, record
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args

from ._flags import parse
from ._train import data, flags, run  # noqa: F401
from .test_plan_flags import MODEL, RUN

FILE = """
target-data: t.jsonl      # as on the command line, from where the run starts
target-batch-size: 4
set: span
alpha: 1e-1
alpha-style: constant
lora-rank: 4
pack: true
log-blocks: false
changed-ok: [dr-target-data, dr-set]
"""


def read(tmp_path: Path, text: str, *more: str) -> argparse.Namespace:
    path = tmp_path / "dr.yaml"
    path.write_text(text)
    argv = ["--dr-config", str(path), *more]
    parser = add_arguments(argparse.ArgumentParser())
    config_file.apply(parser, argv)
    return parser.parse_args(argv)


def test_a_file_is_as_its_flags(tmp_path: Path) -> None:
    """Also in what a checkpoint keeps of a run."""
    found = read(tmp_path, FILE)
    flags = """--dr-target-data t.jsonl --dr-target-batch-size 4 --dr-set span --dr-alpha 0.1
        --dr-alpha-style constant --dr-lora-rank 4 --dr-pack
        --dr-changed-ok dr-target-data dr-set""".split()
    given = parse(*flags)
    differs = {n for n, value in vars(found).items() if value != getattr(given, n)}
    assert differs == {"dr_config"}
    assert configs_from_args(found) == configs_from_args(given)
    for args in (found, given):
        args.micro_batch_size = args.global_batch_size = args.seq_length = 8
    of = [record.of(args, configs_from_args(args), data=False) for args in (found, given)]
    assert of[0] == of[1] and of[0]["dr-alpha"] == 0.1


def test_sets_by_name_are_a_table(tmp_path: Path) -> None:
    text = "target-data: {law: a.jsonl, med: b.jsonl}\ntarget-weights: {law: 2}\n"
    given = parse(*"--dr-target-data law=a.jsonl med=b.jsonl --dr-target-weights law=2".split())
    found = read(tmp_path, f"{text}target-batch-size: {{med: 4}}")
    assert (found.dr_target_data, found.dr_target_weights) == (
        given.dr_target_data, given.dr_target_weights,
    )  # fmt: skip
    configs = configs_from_args(found)
    assert configs is not None and [one.batch for one in configs[1].target_sets] == [8, 4]


def test_the_command_line_wins_wherever_it_stands(tmp_path: Path) -> None:
    for more in (["--dr-set", "hull"], ["--dr-set=hull"]):
        assert read(tmp_path, FILE, *more).dr_set == "hull"
        argv = [*more, "--dr-config", str(tmp_path / "dr.yaml")]
        parser = add_arguments(argparse.ArgumentParser())
        config_file.apply(parser, argv)
        assert parser.parse_args(argv).dr_set == "hull"
    assert read(tmp_path, "device: cpu").dr_device == "cpu"
    assert read(tmp_path, "device: cpu", "--dr-device", "cuda").dr_device == "cuda"
    assert read(tmp_path, "").dr_set is None


@pytest.mark.parametrize("text, says", [
    ("set: span\nlora-rnak: 8", ":2: 'lora-rnak' is none of the plugin's flags without --dr-; "
     "the nearest is 'lora-rank'."),
    ("lora_rank: 8", "the nearest is 'lora-rank'."),
    ("config: other.yaml", "'config' is none of the plugin's flags"),
    ("alpha: many", ":1: argument --dr-alpha: invalid float value: 'many'."),
    ("\nset-of: 1", ":2: 'set-of'"),
    ("gram: neither", ":1: argument --dr-gram: invalid choice: 'neither'"),
    ("pack: 1", ":1: pack must be true or false, not '1'."),
    ("set:", ":1: set must have one value."),
    ("set: [a, b]", ":1: set must have one value."),
    ("target-data: {a: [b]}", ":1: target-data must have one value, or a table of them by name."),
    ("changed-ok: {a: b}", ":1: changed-ok must have one value or a list of them."),
    ("set: span\nset: hull", ":2: 'set' is there twice; first in 1."),
    ("- set", ":1: no table of names and values."),
    ("a: [", ":1: not YAML ("),
    ("set: !!python/object/apply:os.system [ls]", ":1: tag:yaml.org,2002:python/object/apply"),
    ("a: &x 1\nset: *x", ":2: aliases are not read: write the value again."),
])  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        read(tmp_path, text)
    said = str(refused.value)
    assert said.startswith(f"{tmp_path / 'dr.yaml'}:") and says in said and "\n" not in said


def test_no_file(tmp_path: Path) -> None:
    parser = add_arguments(argparse.ArgumentParser())
    with pytest.raises(ValueError, match=r"/no/where\.yaml: no such file\."):
        config_file.apply(parser, ["--dr-config", "/no/where.yaml"])
    config_file.apply(parser, ["--dr-config"])  # the parser itself says that it has no value


def test_the_device_is_known_before_megatron_is(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "dr.yaml"
    path.write_text("device: cpu\n")
    monkeypatch.setattr(sys, "argv", ["train", "--dr-config", str(path), "--lr", "1"])
    cpu.enable_if_asked()
    assert tuple(sys.argv[1 : len(cpu.CPU_FLAGS) + 1]) == cpu.CPU_FLAGS
    assert cpu.device(["--dr-device", "cuda", "--dr-config", str(path)]) == "cuda"
    path.write_text("device: [")
    assert cpu.device(["--dr-config", str(path)]) is None


def test_the_plan_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "dr.yaml"
    path.write_text("target-data: /no/where\ntarget-batch-size: 16\n")
    found = plan_flags.read(f"{MODEL} {RUN} --dr-config {path}".split(), 8)
    assert found.target_batch == 16 and found.wanted is not None


def test_a_run(data: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    """It says which kernels it has; a wrong file ends every rank with one sentence."""
    path = tmp_path / "dr.yaml"
    path.write_text(f"target-data: {data['target']}\ntarget-batch-size: 4\nset: span\n")
    config = f"--dr-config {path}"
    (code, said, _), _ = run(flags(data, config, 1))
    assert code == 0
    assert "megatron_dr: no Transformer Engine; no NVIDIA apex; used are layers of local, Adam " \
        "of torch, and gradient accumulation in torch" in said  # fmt: skip
    assert "megatron_dr: set span" in said
    path.write_text("sett: span\n")
    first, second = run(flags(data, config, 1))
    assert (first[0], second[0]) == (2, 2)
    assert first[2].count("the nearest is 'set'") == 1 and not second[2]
