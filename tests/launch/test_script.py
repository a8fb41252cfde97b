"""The scripts of a run: quoted, with and without Slurm and a container."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_dr.launch import files, script, start
from megatron_dr.launch.recipe import read_recipe

from .test_recipe import FOLDER

ODD = "a b $HOME `id` 'c' \"d\" \\ !1;&.jsonl"


def job(out: Path, *given: str, slurm: bool = False) -> script.Job:
    files = ["hf=/no/hf", "data=/no/data.jsonl"]
    recipe = read_recipe(FOLDER, "llama-3.1-8b/sft", [*files, *given])
    return script.job(recipe, out, slurm)


def checked(made: script.Job) -> None:
    for name in ("job.sh", "node.sh"):
        done = subprocess.run(
            ["bash", "-n"], input=made.files[name], text=True, capture_output=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_words_come_through_the_shell_as_they_are(tmp_path: Path) -> None:
    """To the interpreter, which is a stand-in here that says what it got."""
    out = tmp_path / "o u't $x"
    python = tmp_path / "py thon"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$ODD" "$@"\n')
    python.chmod(0o755)
    made = job(out, f"data=/{ODD}", f"env.ODD={ODD}", f"python={python}", f"target=/{ODD}")
    checked(made)
    made.write()
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(["bash", str(out / "node.sh"), "train"], env=environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    first, *words = done.stdout.splitlines()
    assert first == ODD
    assert words[words.index("megatron_dr.train") + 1 :] == made.flags
    assert made.flags[made.flags.index("--train-data-path") + 1] == f"/{ODD}"
    assert yaml.safe_load((out / "dr.yaml").read_text())["target-data"] == f"/{ODD}"
    done = subprocess.run(["bash", str(out / "node.sh"), "convert", "a b", "$c"], text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[1:] == ["-m", "megatron_dr", "convert", "a b", "$c"]


@pytest.mark.parametrize("given", [
    "setup=[export WANDB_API_KEY=12f3]", "env.PROXY=https_token=12f3",
    "slurm.more=[--export=HF_TOKEN=12f3]",
    "flags.wandb-project=hf_aaaaaaaa12f3",
])  # fmt: skip
def test_no_key_is_written_into_a_script(tmp_path: Path, given: str) -> None:
    with pytest.raises(ValueError, match="a key would be written into") as raised:
        job(tmp_path, given, slurm=True)
    assert "12f3" not in str(raised.value)
    job(tmp_path, "setup=[export WANDB_API_KEY=$(cat ~/.key)]", slurm=True)


def test_a_job_of_slurm(tmp_path: Path) -> None:
    given = ("gpus=16", "slurm.partition=gpu", "slurm.time=2:00:00", "slurm.signal=900",
             "slurm.more=[--constraint=nvlink, --exclude=n7]")  # fmt: skip
    text = job(tmp_path, *given, slurm=True).files["job.sh"]
    for line in ("--nodes=2", "--gpus-per-node=8", "--partition=gpu", "--time=2:00:00", "--requeue",
                 "--signal=B:USR1@900", "--constraint=nvlink", "--exclude=n7",
                 f'--output="{tmp_path}/logs/%j.log"'):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text
    assert "follow srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none " in text
    assert "\n  srun --nodes=1 --ntasks=1 " in text and "--container" not in text
    checked(job(tmp_path, *given, slurm=True))


def test_in_a_container(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has signs that Slurm would not take"):
        job(tmp_path, "slurm.image=a$b", slurm=True)
    given = ("slurm.image=/images/pytorch.sqsh", "slurm.mounts=[/data:/data, /my files:/w]")
    text = job(tmp_path, *given, slurm=True).files["job.sh"]
    assert text.count("--container-image=/images/pytorch.sqsh") == 3
    assert text.count("'--container-mounts=/data:/data,/my files:/w'") == 3


@pytest.mark.parametrize("given, slurm, python", [
    ((), False, sys.executable), (("python=null",), False, sys.executable),
    ((), True, sys.executable), (("slurm.image=/i.sqsh",), False, sys.executable),
    (("slurm.image=/i.sqsh",), True, "python3"),
    (("slurm.image=/i.sqsh", "python=/opt/python"), True, "/opt/python"),
])  # fmt: skip
def test_the_interpreter(tmp_path: Path, given: tuple[str, ...], slurm: bool, python: str) -> None:
    """The launcher's own where none is named, but in a container."""
    text = job(tmp_path, *given, slurm=slurm).files["node.sh"]
    assert text.count(f"exec {shlex.quote(python)} -m ") == 2


@pytest.mark.parametrize("given, says", [
    (("data=null",), "needs data=FILE, the general data; target=FILE names the target's."),
    (("hf=null",), "needs hf=FOLDER, the Hugging Face model; or steps="),
    (("steps=[train, export]",), "steps are in, train and out, not 'export'."),
    (("steps=[]",), "steps must name some of in, train and out."),
    (("flags.train-iters=0",), "flags.train-iters must be a number of 1 or more, not '0'."),
    (("flags.lr=null",), "flags.lr must be a number, not ''."),
    (("flags.lr=.nan",), "flags.lr must be a number, not '.nan'."),
    (("device=CPU",), "device must be cuda or cpu, not 'CPU'."),
    (("device=tpu",), "device must be cuda or cpu, not 'tpu'."),
    (("gpus=12",), "gpus=12 do not fill nodes of 8."),
    (("layout.tp=3",), "gpus=8 must be a multiple of layout.tp=3 x layout.pp=1 x layout.cp=1."),
    (("batch.global=63",), "batch.global=63 must be a multiple of 4: batch.micro=1 x 4 copies of "
     "the model (gpus=8 / layout.tp=2 x layout.pp=1 x layout.cp=1)."),
    (("gpus=6",), "batch.global=64 must be a multiple of 3: batch.micro=1 x 3 copies of the model"),
    (("layout.ep=8",), "gpus=8 must be a multiple of 16, the ranks of all experts: layout.tp=2 x "
     "layout.pp=1 x layout.ep=8."),
    (("flags.eval-iters=4",), "flags.eval-iters=4 needs valid=FILE, the held-out general data."),
    (("gpus=[8]",), "gpus must be a number of 1 or more, not '[8]'."),
    (("gpus=many",), "gpus must be a number of 1 or more, not 'many'."),
    (("precision=fp9",), "precision must be one of fp32, bf16, fp8, not 'fp9'."),
    (("recompute=some",), "recompute must be one of none, selective, full"),
    (("config.num_attention_heads=33",), "llama-3.1-8b/sft/8xh100: config: "),
    (("slurm.partition=a\"b",), "slurm.partition: 'a\"b' has signs"),
    (("data=[0.5, a, b]",), "data must have a weight before each path or before none: data=[0.7,"),
    (("data=0.5 /a.jsonl 0.5 /b",), "data='0.5 /a.jsonl 0.5 /b' is one path: give a blend as a "
     "list, data=[0.5,/a.jsonl,0.5,/b]."),
    (("valid=1,v",), "valid='1,v' is one path: give a blend as a list, valid=[1,v]."),
    (("data=[]",), "data must be a path or a list of them, not []."),
    (("data=[a, [b]]",), "data must be a path or a list of them, not [a, [b]]."),
    (("target=[law=a, b]",), "target b: where there are several each has a name"),
    (("target=t", "dr.target-data=u"), "dr.target-data is made from the recipe's key target: "),
    (("target_dr.target-data=u",), "target_dr.target-data is made from the recipe's key target"),
    (("dr.device=cpu",), "dr.device is made from the recipe's key device: give that."),
    (("flags.load=/x",), "flags.load is made from the recipe's key out: give that."),
    (("flags.save=/x",), "flags.save is made from the recipe's key out: give that."),
    (("flags.train-data-path=[/x]",), "flags.train-data-path is made from the recipe's key data"),
    (("flags.micro-batch-size=2",), "is made from the recipe's key batch.micro: give that."),
    (("flags.tensor-model-parallel-size=4",), "is made from the recipe's key layout.tp: give"),
    (("flags.num-layers=4",), "flags.num-layers is made from the recipe's key config: give that."),
    (("recompute=full", "flags.recompute-method=block"), "made from the recipe's key recompute: "),
    (("flags.exit-signal=SIGINT",), "flags.exit-signal is what the run's scripts count on: leave"),
    (("flags.dr-set=span",), "flags.dr-set is the plugin's: give dr.set."),
    (("env.A-B=1",), "env.A-B is no name of a variable."),
])  # fmt: skip
def test_what_can_t_be(tmp_path: Path, given: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        job(tmp_path, *given, slurm=True)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_the_model_of_the_folder_is_the_recipe_s(tmp_path: Path) -> None:
    config = json.loads(json.dumps(_config()))
    (tmp_path / "config.json").write_text(json.dumps(config))
    job(tmp_path / "o", f"hf={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 16}))
    with pytest.raises(ValueError, match="its layers is 16, not 32"):
        job(tmp_path / "o", f"hf={tmp_path}")


def _config() -> dict[str, Any]:
    from megatron_dr.config.yaml_file import plain

    return plain(read_recipe(FOLDER, "llama-3.1-8b/sft", []).of("config"))


def test_no_target_no_flags_of_one(tmp_path: Path) -> None:
    found = yaml.safe_load(job(tmp_path).files["dr.yaml"])
    assert found == {"metrics": str(tmp_path / "metrics.jsonl")}
    found = yaml.safe_load(job(tmp_path, "target=/t.jsonl", "dr.set=span").files["dr.yaml"])
    assert found["target-data"] == "/t.jsonl" and found["set"] == "span"
    assert found["target-batch-size"] == "16"


def test_blends_and_sets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths alone are made absolute."""
    monkeypatch.chdir(tmp_path)
    made = job(tmp_path, "data=[0.5, a.jsonl, 2, /b c.jsonl]", "valid=[v, w]",
               "target=[law=a=b.jsonl, med=/m.jsonl]", "target_valid=law=v.jsonl")  # fmt: skip
    at, here = made.flags.index("--train-data-path"), str(tmp_path)
    assert made.flags[at + 1 : at + 5] == ["0.5", f"{here}/a.jsonl", "2", "/b c.jsonl"]
    at = made.flags.index("--valid-data-path")
    assert made.flags[at + 1 : at + 3] == [f"{here}/v", f"{here}/w"]
    ours = yaml.safe_load(made.files["dr.yaml"])
    assert ours["target-data"] == [f"law={here}/a=b.jsonl", "med=/m.jsonl"]
    assert ours["target-valid-data"] == f"law={here}/v.jsonl"


def test_a_file_named_as_a_blend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.5 a.jsonl").touch()
    made = job(tmp_path, "data=0.5 a.jsonl")
    assert made.flags[made.flags.index("--train-data-path") + 1] == f"{tmp_path}/0.5 a.jsonl"


def test_evaluations_need_what_they_are_of(tmp_path: Path) -> None:
    for given, batches in (("flags.eval-iters=0",), "0"), (("valid=/v", "flags.eval-iters=4"), "4"):
        flags = job(tmp_path, *given).flags
        assert flags[flags.index("--eval-iters") + 1] == batches


def test_what_a_run_begins_with_is_there(tmp_path: Path) -> None:
    def refused(*given: str) -> str:
        recipe = read_recipe(FOLDER, "llama-3.1-8b/sft", [f"hf={tmp_path}", *given])
        try:
            files.check(recipe, tmp_path / "base")
        except ValueError as error:
            return str(error)
        return ""

    data = tmp_path / "d.jsonl"
    data.touch()
    assert refused(f"data={data}").startswith(f"hf={tmp_path}: there is no config.json: ")
    (tmp_path / "base").touch()  # a converted model needs no other
    assert refused(f"data={data}") == ""
    (tmp_path / "base").unlink()
    (tmp_path / "config.json").touch()
    (tmp_path / "p.idx").touch()
    assert refused(f"data=[0.5,{data},1,{tmp_path / 'p'}]", f"target=law={data}") == ""
    for key in files.KEYS:
        said = refused(f"data={data}", f"{key}={tmp_path / 'no'}")
        assert said.startswith(f"{key}: {tmp_path / 'no'} is not there: name a file")
        assert refused(f"data={data}", f"{key}={tmp_path / 'no'}", "steps=[in]") == ""
    assert refused(f"data={data}", f"target=[a={data},b=/no]").startswith("target: /no is not ")


def test_slurm_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no sbatch on this machine"):
        start.submit(job(tmp_path, slurm=True))
