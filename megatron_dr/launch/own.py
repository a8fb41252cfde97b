"""The flags that a recipe's other keys make: given beside them they would be overridden, or would
contradict what else is made of these keys."""

from collections.abc import Sequence

from megatron_dr.launch.recipe import Recipe

SIZES = {
    "tp": "--tensor-model-parallel-size", "pp": "--pipeline-model-parallel-size",
    "vpp": "--num-virtual-stages-per-pipeline-rank", "cp": "--context-parallel-size",
    "ep": "--expert-model-parallel-size", "etp": "--expert-tensor-parallel-size",
}  # fmt: skip
BATCH = {
    "micro": "--micro-batch-size", "global": "--global-batch-size", "length": "--seq-length",
}  # fmt: skip
_KEYS = {
    **{flag[2:]: f"layout.{name}" for name, flag in SIZES.items()},
    **{flag[2:]: f"batch.{name}" for name, flag in BATCH.items()},
    "num-layers-per-virtual-pipeline-stage": "layout.vpp", "sequence-parallel": "layout.sp",
    "bf16": "precision", "fp8-format": "precision",
    "load": "out", "save": "out", "pretrained-checkpoint": "out",
    "tokenizer-type": "hf", "tokenizer-model": "hf",
    "exit-signal-handler": "", "exit-signal": "",
    "data-path": "data", "train-data-path": "data", "valid-data-path": "valid",
}  # fmt: skip
_OF_RECOMPUTE = ("recompute-granularity", "recompute-method", "recompute-num-layers")
# of a model's flags those that a run may have otherwise than its checkpoint
_FREE = ("max-position-embeddings", "attention-dropout", "hidden-dropout")


def check(recipe: Recipe, model: Sequence[str]) -> None:
    """Raise ValueError for a flag that another key of the recipe makes.

    Args:
        model: the model's own flags and their values.
    """
    keys = {word[2:]: "config" for word in model if word.startswith("--")} | _KEYS
    for name in _FREE:
        keys.pop(name, None)
    if recipe.text("recompute") != "none":
        keys |= dict.fromkeys(_OF_RECOMPUTE, "recompute")
    for name in recipe.of("flags"):
        if name.startswith("dr-"):
            raise ValueError(f"flags.{name} is the plugin's: give dr.{name[3:]}.")
        _refuse(f"flags.{name}", keys.get(name))
    ours = {"device": "device"} | {
        entry.text[3:]: key for key, entry in recipe.of("files").items()
        if entry.text.startswith("dr.")
    }  # fmt: skip
    for table in ("dr", "target_dr"):
        for name in recipe.of(table):
            _refuse(f"{table}.{name}", ours.get(name))


def _refuse(given: str, key: str | None) -> None:
    if key == "":
        raise ValueError(f"{given} is what the run's scripts count on: leave it out.")
    if key is not None:
        raise ValueError(f"{given} is made from the recipe's key {key}: give that.")
