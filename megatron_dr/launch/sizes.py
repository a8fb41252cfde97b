"""Whether a recipe's GPUs and batch go with its layout, and what a plan proposes, by its keys."""

import re

from megatron_dr.launch.own import BATCH, SIZES
from megatron_dr.launch.recipe import Recipe

_SWEEP = "take more GPUs for a copy of the model: --sweep proposes layouts"
_LARGER = "give a larger layout.tp or layout.pp (layout.ep for experts), or more gpus"
_RECOMPUTE = {
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1": "full",
    "--recompute-granularity selective": "selective",
}
_SWITCHES = {
    "--sequence-parallel": "layout.sp=true",
    "--use-distributed-optimizer": "flags.use-distributed-optimizer=true",
}


def check(recipe: Recipe) -> None:
    """Raise ValueError where Megatron would refuse the sizes, in terms of flags or of its own."""
    gpus = recipe.number("gpus")
    ranks, of_model = _product(recipe, "tp", "pp", "cp")
    if gpus % ranks:
        raise ValueError(f"{recipe.name}: gpus={gpus} must be a multiple of {of_model}.")
    copies = gpus // ranks
    batch, micro = recipe.number("batch", "global"), recipe.number("batch", "micro")
    if batch % (micro * copies):
        raise ValueError(
            f"{recipe.name}: batch.global={batch} must be a multiple of {micro * copies}: "
            f"batch.micro={micro} x {copies} copies of the model (gpus={gpus} / {of_model})."
        )
    if recipe.number("layout", "ep", 1) == 1 and recipe.value("layout", "etp") is None:
        return
    tensor = "tp" if recipe.value("layout", "etp") is None else "etp"
    ranks, of_experts = _product(recipe, tensor, "pp", "ep")
    if gpus % ranks:
        raise ValueError(
            f"{recipe.name}: gpus={gpus} must be a multiple of {ranks}, the ranks of all experts: "
            f"{of_experts}."
        )


def by_keys(refusal: str, recipe: Recipe) -> str:
    """A plan's sentence of what does not fit, whose flags are those of `megatron-dr plan`."""
    first, semicolon, change = refusal.rpartition("; ")
    # a pair is planned as two sequences, and is not divided
    if _SWEEP in change or BATCH["micro"] in change and recipe.value("sequences", default=1) > 1:
        return f"{first}{semicolon}{_LARGER}."
    for flags, name in _RECOMPUTE.items():
        change = change.replace(flags, f"recompute={name}")
    for flag, key in _SWITCHES.items():
        change = change.replace(flag, key)
    for table, flags_of in (("layout", SIZES), ("batch", BATCH)):
        for name, flag in flags_of.items():
            change = re.sub(rf"{flag} (\d+)", rf"{table}.{name}=\1", change)
    change = re.sub(r"--dr-([\w-]+) (\S+)", r"dr.\1=\2", change)
    return f"{first}{semicolon}{change}"


def _product(recipe: Recipe, *names: str) -> tuple[int, str]:
    """Of sizes of the layout, as a number and in words."""
    found, words = 1, []
    for name in names:
        size = recipe.number("layout", name, 1)
        found *= size
        words.append(f"layout.{name}={size}")
    return found, " x ".join(words)
