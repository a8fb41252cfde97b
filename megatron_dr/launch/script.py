"""The shell scripts of a run: what the job does, and what each of its nodes runs."""

import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from megatron_dr.launch import flags, sizes
from megatron_dr.launch.recipe import Recipe
from megatron_dr.report import hidden

_PLAIN = re.compile(r"[\w.,:/@%+=#\[\]*() -]*")  # of an option of Slurm's


@dataclass(frozen=True)
class Job:
    """A recipe's run in a folder.

    Attributes:
        out: the folder, which all nodes see.
        files: texts by the name of their file in it.
        log: what the job says.
        flags: Megatron's and --dr-config, as the ranks get them.
    """

    out: Path
    files: dict[str, str]
    log: Path
    flags: list[str]

    def write(self) -> None:
        """Make the folder with its files."""
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (self.out / name).write_text(text, encoding="utf-8")


def job(recipe: Recipe, out: Path, slurm: bool, port: int = 29500) -> Job:
    """The run of a recipe.

    Raises:
        ValueError: a value that can't be, or that is missing; a key in what would be written.
    """
    config = flags.config_text(flags.ours(recipe, out))
    train = [*flags.megatron(recipe, out), "--dr-config", str(out / "dr.yaml")]
    log = out / "logs" / ("%j.log" if slurm else "local.log")
    environment = _environment()
    common = _names(recipe, out, slurm) | _slurm(recipe) | {"log": str(log), "port": port}
    sizes.check(recipe)
    texts = {
        "job.sh": environment.get_template("job.sh.jinja").render(common),
        "node.sh": environment.get_template("node.sh.jinja").render(common, lines=_lines(train)),
        "dr.yaml": config,
    }
    for name, text in texts.items():
        for line in filter(hidden.holds_key, text.splitlines()):
            raise ValueError(
                f"{recipe.name}: a key would be written into {name}, by "
                f"{hidden.shown(line.strip())}: set it in your own environment, which the run "
                "inherits."
            )
    return Job(out, texts, log, train)


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("megatron_dr.launch", "templates"), trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    found.filters["q"] = lambda text: shlex.quote(str(text))
    return found


def _names(recipe: Recipe, out: Path, slurm: bool) -> dict[str, Any]:
    """What the templates name; a word of a command line is quoted here or there by `q`."""
    steps = recipe.texts("steps")
    if not steps:
        raise ValueError(f"{recipe.name}: steps must name some of in, train and out.")
    wrong = [step for step in steps if step not in ("in", "train", "out")]
    if wrong:
        raise ValueError(f"{recipe.name}: steps are in, train and out, not {wrong[0]!r}.")
    if "in" in steps and not recipe.text("hf"):
        raise ValueError(
            f"{recipe.name} needs hf=FOLDER, the Hugging Face model; or steps=[train,out] with "
            f"one that is converted in {out / 'base'}."
        )
    iterations = recipe.text("flags", "train-iters")
    if not iterations.isdigit() or int(iterations) < 1:
        raise ValueError(
            f"{recipe.name}: flags.train-iters must be a number of 1 or more, not {iterations!r}."
        )
    rate = recipe.value("flags", "lr")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < math.inf:
        raise ValueError(
            f"{recipe.name}: flags.lr must be a number, not {recipe.text('flags', 'lr')!r}."
        )
    if recipe.text("device") not in ("cuda", "cpu"):
        raise ValueError(
            f"{recipe.name}: device must be cuda or cpu, not {recipe.text('device')!r}."
        )
    layout = [f"--{name} {recipe.number('layout', name, 1)}" for name in ("tp", "pp", "ep")]
    train, base, hf = out / "train", out / "base", out / "hf"
    source = shlex.quote(str(Path(recipe.text("hf")).absolute()))
    nodes, ranks = _nodes(recipe)
    return {
        "name": recipe.name, "here": Path.cwd(), "steps": steps, "slurm": slurm,
        "python": _python(recipe, slurm), "env": _env(recipe), "setup": recipe.texts("setup"),
        "iterations": iterations, "nodes": nodes, "ranks": ranks,
        "gpus_of_node": 0 if recipe.text("device") == "cpu" else ranks,
        "node": out / "node.sh", "tracker": train / "latest_checkpointed_iteration.txt",
        "base_tracker": base / "latest_checkpointed_iteration.txt",
        "exported": hf / "config.json", "signal": flags.EXIT_SIGNAL.removeprefix("SIG"),
        "convert_in": f"convert hf-to-mcore {source} {shlex.quote(str(base))} {' '.join(layout)}",
        "convert_out": f"convert mcore-to-hf {shlex.quote(str(train))} {shlex.quote(str(hf))}",
        "once": _srun(recipe, 1) if slurm else "", "each": _srun(recipe, nodes) if slurm else "",
    }  # fmt: skip


def _python(recipe: Recipe, slurm: bool) -> str:
    """The interpreter: by default this one, which a container need not have."""
    of_a_container = slurm and recipe.text("slurm", "image")
    return recipe.text("python") or ("python3" if of_a_container else sys.executable)


def _nodes(recipe: Recipe) -> tuple[int, int]:
    """Nodes, and ranks of each.

    Raises:
        ValueError: GPUs that do not fill nodes.
    """
    gpus, of_node = recipe.number("gpus"), recipe.number("gpus_per_node")
    if gpus > of_node and gpus % of_node:
        raise ValueError(f"{recipe.name}: gpus={gpus} do not fill nodes of {of_node}.")
    return max(1, gpus // of_node), min(gpus, of_node)


def _env(recipe: Recipe) -> dict[str, str]:
    found = {name: entry.text for name, entry in recipe.of("env").items()}
    for name in found:
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"env.{name} is no name of a variable.")
    return found


def _slurm(recipe: Recipe) -> dict[str, Any]:
    """What the job asks of Slurm."""
    table = {name: recipe.texts("slurm", name) for name in recipe.of("slurm")}
    for name, values in table.items():
        for value in values:
            if not _PLAIN.fullmatch(value):
                raise ValueError(f"slurm.{name}: {value!r} has signs that Slurm would not take.")
    asked = {name: recipe.text("slurm", name) for name in ("partition", "account", "qos")}
    options = [f"--{name}={value}" for name, value in asked.items() if value]
    default = recipe.name.replace("/", "-")
    return {
        "time": recipe.text("slurm", "time"), "signal_seconds": recipe.number("slurm", "signal"),
        "job_name": recipe.text("slurm", "job_name") or default,
        "options": [*options, *recipe.texts("slurm", "more")],
    }  # fmt: skip


def _srun(recipe: Recipe, nodes: int) -> str:
    words = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
             "--cpu-bind=none", "--kill-on-bad-exit=1"]  # fmt: skip
    if recipe.text("slurm", "image"):
        words.append(f"--container-image={recipe.text('slurm', 'image')}")
        mounts = recipe.texts("slurm", "mounts") or [f"{Path.cwd()}:{Path.cwd()}"]
        words.append(f"--container-mounts={','.join(mounts)}")
    return shlex.join(words)


def _lines(words: list[str]) -> list[str]:
    """A flag and its values on a line, quoted."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return [shlex.join(line) for line in lines]
