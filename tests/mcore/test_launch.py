"""Every recipe of examples/cluster: Megatron's parser takes it, it fits, it trains when small."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_dr.cli import convert, launch_plan
from megatron_dr.cli.launch import main
from megatron_dr.launch import script
from megatron_dr.launch.recipe import names_of
from megatron_dr.mcore.loop import plan_flags
from megatron_dr.report import metrics

from ._launch import FOLDER, small, whole
from ._ranks import run_ranks
from ._train import launch

NAMES = names_of(FOLDER)
MODELS = dict.fromkeys(name.split("/")[0] for name in NAMES)
METHODS = ("sft", "lora", "dpo", "grpo")
# one of each model and of each method at each commit, the others in make soak
FEW = {next(n for n in NAMES if n.startswith(f"{model}/{METHODS[k % 4]}/"))
       for k, model in enumerate(MODELS)}  # fmt: skip


def few(names: list[str]) -> list[object]:
    return [n if n in FEW else pytest.param(n, marks=pytest.mark.soak) for n in names]


def test_every_model_has_every_method() -> None:
    assert len(MODELS) == 8
    for model in MODELS:
        assert {name.split("/")[1] for name in NAMES if name.startswith(model)} == set(METHODS)


@pytest.mark.parametrize("name", few(NAMES))
def test_megatron_takes_it_and_it_fits(name: str, tmp_path: Path) -> None:
    """Both parsers' checks of the whole run's flags at its world size, and the plan's memory."""
    recipe = whole(name)
    numbers = launch_plan.numbers(recipe, script.job(recipe, tmp_path, False))
    assert numbers["refusal"] == "" and numbers["memory"]["most"] <= numbers["memory"]["usable"]
    assert numbers["layout"]["gpus"] == recipe.number("gpus")


def test_fp8_by_its_name(tmp_path: Path) -> None:
    recipe = whole("llama-3.1-8b/sft", "precision=fp8")
    job = script.job(recipe, tmp_path, False)
    assert job.flags[job.flags.index("--fp8-format") + 1] == "hybrid"
    assert "fp8 is planned as bf16" in " ".join(launch_plan.numbers(recipe, job)["chosen"])
    with pytest.raises(ValueError, match="fp8 is of Transformer Engine's layers, and these are"):
        script.job(whole("llama-3.1-8b/lora", "precision=fp8"), tmp_path, False)


def test_domains_and_target_sets(tmp_path: Path) -> None:
    """Through both parsers, and planned."""
    recipe = whole(
        "llama-3.1-8b/sft", "data=[0.5, /a.jsonl, 0.3, /b.jsonl, 0.2, /c.jsonl]", "dr.rows=domain",
        "target=[law=/l.jsonl, med=/m.jsonl]", "target_dr.target-batch-size=[law=4, med=8]",
        "dr.domain-sampling=0.1,4", "dr.targets=maximin",
    )  # fmt: skip
    job = script.job(recipe, tmp_path, False)
    job.write()
    args, configs = plan_flags._validated(job.flags, 8, False)
    assert args.train_data_path == ["0.5", "/a.jsonl", "0.3", "/b.jsonl", "0.2", "/c.jsonl"]
    assert configs is not None and configs[0].rows == "domain"
    assert [(one.name, one.path, one.batch) for one in configs[1].target_sets] == [
        ("law", "/l.jsonl", 4), ("med", "/m.jsonl", 8)
    ]  # fmt: skip
    chosen = " ".join(launch_plan.numbers(recipe, job)["chosen"])
    assert "Rows of domains are planned as 4 slots" in chosen and "maximin is not" in chosen


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan and the scripts; what does not fit is not started, what can't be is one sentence."""
    files = ["hf=/no/where", "data=/no/general.jsonl", f"out={tmp_path / 'out'}"]
    assert main(["mistral-7b/sft", *files, "--slurm", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "Memory, GB" in said.err and "#SBATCH --signal=B:USR1@600" in said.out
    assert f"# -- {tmp_path / 'out' / 'node.sh'}" in said.out and not (tmp_path / "out").exists()
    assert main(["mistral-7b/sft", *files]) == 2
    assert "hf=/no/where: there is no config.json: name " in capsys.readouterr().err
    (tmp_path / "g.jsonl").touch()
    files = [f"data={tmp_path / 'g.jsonl'}", "steps=[train]", *files[2:]]
    assert main(["llama-3.1-70b/lora", *files, "layout.tp=1", "batch.global=8"]) == 1
    said = capsys.readouterr()
    assert "It does not fit: a rank needs" in said.err and not (tmp_path / "out").exists()
    assert "it does not fit; --force starts it all the same." in said.err
    for more, sentence in (
        (["layout.vpp=2"], "Megatron refuses these arguments"),
        (["flags.no-such-flag=1"], "unrecognized arguments: --no-such-flag"),
        (["target=/t", "target_dr.sett=span"], "target_dr.sett: 'sett' is none of the plugin's"),
        (["dr.lora-rank=abc"], "8xh100: dr.lora-rank: invalid int value: 'abc'."),
        (["gpus=9"], "gpus=9 do not fill nodes of 8."),
    ):  # fmt: skip
        assert main(["mistral-7b/sft", *files, *more, "--dry-run"]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("launch: error: ") and sentence in said.err
        assert said.err.count("\n") == 1 and not said.out


def converted(name: str, folder: Path, *more: str) -> tuple[script.Job, int]:
    """A small recipe's job, its model at Megatron's; and the ranks that it wants."""
    recipe = small(name, folder, *more)
    job = script.job(recipe, folder / "out", False)
    job.write()
    sizes = [f"--{size}={recipe.number('layout', size)}" for size in ("tp", "pp", "ep")]
    assert convert.main(["hf-to-mcore", str(folder / "hf"), str(job.out / "base"), *sizes]) == 0
    return job, recipe.number("gpus")


def check_export(folder: Path, job: script.Job) -> None:
    """Converted back; weights have moved."""
    out = job.out
    assert convert.main(["mcore-to-hf", str(out / "train"), str(out / "hf")]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (folder / "hf", out / "hf"))
    assert before.keys() == after.keys()
    assert any(not before[key].equal(after[key]) for key in before)
    assert all(value.isfinite().all() for value in after.values())


def iterations(job: script.Job) -> list[int]:
    return [line["iteration"] for line in metrics.read(job.out / "metrics.jsonl", "train")]


def saved(job: script.Job) -> int:
    return int((job.out / "train" / "latest_checkpointed_iteration.txt").read_text())


def launch_and_stop(argv: list[str], path: Path) -> tuple[int, str, str]:
    """On a rank: it is told to stop when the first step is done."""

    def stop() -> None:
        while not (path.exists() and path.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    return launch(argv)


def test_a_small_one_trains(tmp_path: Path) -> None:
    """Stopped by the signal of its scripts, gone on with, and complete."""
    more = ("gpus=2", "layout.tp=2", "flags.train-iters=8")
    job, ranks = converted("qwen3-8b/sft", tmp_path, *more)
    for code, _, error in run_ranks(ranks, launch_and_stop, job.flags, job.out / "metrics.jsonl"):
        assert code == 0, error[-3000:]
    last = saved(job)
    assert 0 < last < 8 and iterations(job) == list(range(1, last + 1))
    for code, _, error in run_ranks(ranks, launch, job.flags):
        assert code == 0, error[-3000:]
    assert iterations(job) == list(range(1, 9)) and saved(job) == 8
    check_export(tmp_path, job)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_in_its_layout(name: str, tmp_path: Path) -> None:
    """Of more than 8 GPUs in one with the same parallel sizes above 1, on 4 ranks."""
    job, ranks = converted(name, tmp_path)
    for code, _, error in run_ranks(ranks, launch, job.flags, timeout=800):
        assert code == 0, error[-3000:]
    assert iterations(job) == [1, 2] and saved(job) == 2
    check_export(tmp_path, job)
