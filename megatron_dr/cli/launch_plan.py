"""The plan of a recipe, whose flags are first read as its run would read them."""

import math
import re
import tempfile
from pathlib import Path
from typing import Any

from megatron_dr.cli.plan import hardware_of
from megatron_dr.config.lora import LoRAConfig
from megatron_dr.config.yaml_file import Entry
from megatron_dr.launch import files, flags, sizes
from megatron_dr.launch.recipe import Recipe
from megatron_dr.launch.script import Job

_LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_UNPLANNED = ("lora-", "dpo-", "rl-", "metrics", "device", "changed-ok", "pack", "thoughts",
              "domain-")  # fmt: skip


def numbers(recipe: Recipe, job: Job) -> dict[str, Any]:
    """As `megatron-dr plan` has them, and what of the recipe is not in them.

    Adapters are planned by their share of what is trained, pairs as twice as many sequences,
    training by rewards as that on as many samples, fp8 as bf16.

    Raises:
        ValueError: flags that the run would refuse.
    """
    from megatron_dr.mcore import cpu

    cpu.enable()  # before Megatron is imported
    from megatron_dr.mcore.loop import plan_flags
    from megatron_dr.plan import adapters
    from megatron_dr.plan.asked import settle
    from megatron_dr.plan.report import report

    gpus, hardware = recipe.number("gpus"), hardware_of(recipe.text("hardware"))
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "dr.yaml"
        config.write_text(job.files["dr.yaml"], encoding="utf-8")
        try:
            plan_flags.check([*job.flags[:-1], str(config)], gpus)
        except ValueError as error:
            raise ValueError(_by_key(str(error), str(config), recipe, job)) from None
    asked, rank = plan_flags.read(_planned(recipe, job), gpus), recipe.value("dr", "lora-rank")
    if rank is None:
        run, said = settle(asked, hardware)
        found = report(run, hardware, [*said, *_notes(recipe)])
        return found | {"refusal": sizes.by_keys(found["refusal"], recipe)}
    targets = recipe.text("dr", "lora-targets") or LoRAConfig.targets
    lora = LoRAConfig(rank=int(rank), targets=targets)
    layers = [n for n in _LINEAR if lora.matches(n) and not (asked.model.experts and "_fc" in n)]
    run, said = settle(adapters.alone(asked, int(rank), layers), hardware)
    return adapters.report_of(run, hardware, [*said, *_notes(recipe)], int(rank), layers)


def _by_key(sentence: str, config: str, recipe: Recipe, job: Job) -> str:
    """A refusal of a line of dr.yaml, by the recipe's key that the line is made from."""
    found = re.match(rf"{re.escape(config)}:(\d+): (.*)", sentence, re.DOTALL)
    if not found:
        return sentence
    name = job.files["dr.yaml"].splitlines()[int(found[1]) - 1].partition(":")[0]
    of_files = {entry.text: key for key, entry in recipe.of("files").items()}
    table = "target_dr" if name in recipe.of("target_dr") and recipe.has("target") else "dr"
    key = of_files.get(f"dr.{name}", f"{table}.{name}")
    return f"{recipe.name}: {key}: {found[2].removeprefix(f'argument --dr-{name}: ')}"


def _planned(recipe: Recipe, job: Job) -> list[str]:
    """The run's flags as the plan knows them."""
    times = recipe.value("sequences", default=1)
    table = dict(recipe.table)
    batch = recipe.of("batch")
    for name in ("micro", "global"):
        size = recipe.number("batch", name) * times
        batch[name] = Entry(size, str(size), 0)
    table["batch"] = Entry(batch, "", 0)
    if recipe.text("precision") == "fp8":
        table["precision"] = Entry("bf16", "bf16", 0)
    words = flags.shape(Recipe(recipe.name, table))
    ours = flags.ours(recipe, job.out)
    if ours.get("targets") == "maximin":
        del ours["targets"]
    if ours.get("rows") == "domain":
        ours |= {"rows": "slot", "slots": str(_slots(recipe))}
    for name, value in ours.items():
        if name.startswith(_UNPLANNED) or value is False:
            continue
        texts = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if name == "target-batch-size":
            texts = [_times(text, times) for text in texts]
        words += [f"--dr-{name}", *(texts if value is not True else ())]
    return [*words, *(["--dr-device", "cpu"] if recipe.text("device") == "cpu" else [])]


def _times(text: str, times: int) -> str:
    """A number, or NAME=NUMBER, times so many."""
    name, equals, number = text.rpartition("=")
    return f"{name}{equals}{int(number) * times}"


def _slots(recipe: Recipe) -> int:
    """As many as there are general corpora, or more where these do not divide the microbatches."""
    sizes_of = [recipe.number("layout", name, 1) for name in ("tp", "pp", "cp")]
    ranks = recipe.number("gpus") // math.prod(sizes_of)
    microbatches = recipe.number("batch", "global") // recipe.number("batch", "micro") // ranks
    wanted = files.corpora(recipe)
    found = [n for n in range(wanted, microbatches + 1) if microbatches % n == 0]
    return min(found, default=max(microbatches, 1))


def _notes(recipe: Recipe) -> list[str]:
    found = []
    if recipe.text("dr", "rows") == "domain":
        found.append(f"Rows of domains are planned as {_slots(recipe)} slots of each rank.")
    if recipe.text("dr", "targets") == "maximin":
        found.append("The gradient that each target set keeps with maximin is not counted.")
    if recipe.text("precision") == "fp8":
        found.append("fp8 is planned as bf16: its copies of weights are not counted.")
    if recipe.value("sequences", default=1) == 2:
        found.append("A pair is planned as two sequences.")
    if recipe.text("dr", "rl-algorithm"):
        found.append(
            "Steps on completions are planned as those on samples: the keys and values of a "
            "rollout, and a reward model, are not counted."
        )
    return found
