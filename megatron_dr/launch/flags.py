"""A recipe's flags: Megatron's, and ours for --dr-config."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_dr.config.yaml_file import Entry, Table, plain
from megatron_dr.hf.config import command_line, megatron_arguments, padded_vocabulary, parse
from megatron_dr.hf.config import read_model as read_hf
from megatron_dr.hf.model import Model
from megatron_dr.launch import files, own
from megatron_dr.launch.recipe import Recipe

EXIT_SIGNAL = "SIGTERM"  # Megatron's default, which torchrun's ranks are sent by node.sh
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
RECOMPUTE = {
    "none": "", "selective": "--recompute-granularity selective", "full": _FULL,
}  # fmt: skip
PRECISION = {"fp32": "", "bf16": "--bf16", "fp8": "--bf16 --fp8-format hybrid"}
# of a GPU's kernels; --dr-device cpu brings its own
_ON_A_GPU = ("transformer-impl", "moe-grouped-gemm", "moe-permute-fusion")


def model_of(recipe: Recipe) -> Model:
    """The model, read as a config.json is.

    Raises:
        ValueError: it can't be converted, or the folder that `hf` names has another.
    """
    try:
        found = parse(plain(recipe.of("config")))
    except ValueError as error:
        text = str(error).replace("config.json", f"{recipe.name}: config", 1)
        raise ValueError(text) from None
    folder = Path(recipe.text("hf"))
    if recipe.text("hf") and (folder / "config.json").exists():
        there = read_hf(folder)
        differs = [n for n, value in vars(found).items() if getattr(there, n) != value]
        if differs:
            name = differs[0]
            raise ValueError(
                f"{folder}: it is not the model of {recipe.name}: its {name} is "
                f"{getattr(there, name)}, not {getattr(found, name)}."
            )
    return found


def megatron(recipe: Recipe, out: Path) -> list[str]:
    """Megatron's flags of the training run that writes into `out`.

    Raises:
        ValueError: a value that there is not, or one that is missing.
    """
    train, base = out / "train", out / "base"
    paths = ["--load", str(train), "--save", str(train), "--pretrained-checkpoint", str(base),
             "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(base / "hf"),
             "--exit-signal-handler", "--exit-signal", EXIT_SIGNAL]  # fmt: skip
    found = files.by_flag(recipe)
    data = [word for flag, words in found.items() if not flag.startswith("dr.")
            for word in (f"--{flag}", *words)]  # fmt: skip
    return [*shape(recipe), *data, *paths]


def shape(recipe: Recipe) -> list[str]:
    """Of the model, its layout, batch and schedule: what does not name files."""
    words = shlex.split(_model(recipe))
    own.check(recipe, words)
    for name, flag in own.SIZES.items():
        size = recipe.number("layout", name, 1)
        words += [flag, str(size)] if size > 1 or name == "etp" and _says(recipe, "etp") else []
    if recipe.number("layout", "tp", 1) > 1 and recipe.value("layout", "sp"):
        words.append("--sequence-parallel")
    for name, flag in own.BATCH.items():
        words += [flag, str(recipe.number("batch", name))]
    words += shlex.split(_choice(recipe, "recompute", RECOMPUTE))
    words += shlex.split(_choice(recipe, "precision", PRECISION))
    layers = recipe.text("flags", "transformer-impl") or "transformer_engine"
    if recipe.text("precision") == "fp8" and layers != "transformer_engine":
        raise ValueError(
            f"{recipe.name}: precision=fp8 is of Transformer Engine's layers, and these are "
            f"{layers}: take bf16."
        )
    return words + _words(_free(recipe))


def _free(recipe: Recipe) -> Table:
    flags = recipe.of("flags")
    batches = flags.get("eval-iters")
    if not recipe.has("valid") and batches is not None:
        if batches.line == 0 and batches.value:  # of the command line, not of a recipe's file
            raise ValueError(
                f"{recipe.name}: flags.eval-iters={batches.text} needs valid=FILE, the held-out "
                "general data."
            )
        flags["eval-iters"] = Entry(0, "0", 0)
    if recipe.text("device") == "cpu":
        flags = {name: entry for name, entry in flags.items() if name not in _ON_A_GPU}
    return flags


def _says(recipe: Recipe, name: str) -> bool:
    return recipe.value("layout", name) is not None


def _model(recipe: Recipe) -> str:
    """As a conversion writes them."""
    model = model_of(recipe)
    return command_line(
        megatron_arguments(model, padded_vocabulary(model, recipe.number("layout", "tp", 1)))
    )


def ours(recipe: Recipe, out: Path) -> dict[str, Any]:
    """The plugin's, by name without --dr-, as text and lists."""
    entries = recipe.of("dr") | (recipe.of("target_dr") if recipe.has("target") else {})
    found: dict[str, Any] = {name: _plain(entry) for name, entry in entries.items()}
    for flag, words in files.by_flag(recipe).items():
        if flag.startswith("dr."):
            found[flag.removeprefix("dr.")] = words if len(words) > 1 else words[0]
    found.setdefault("metrics", str(out / "metrics.jsonl"))
    if recipe.text("device") == "cpu":
        found["device"] = "cpu"
    return {name: value for name, value in found.items() if value is not None}


def config_text(found: Mapping[str, Any]) -> str:
    """YAML of them; JSON's texts are YAML's."""
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in found.items())


def _plain(entry: Entry) -> Any:
    if isinstance(entry.value, list):
        return [one.text for one in entry.value]
    if isinstance(entry.value, dict):
        raise ValueError("a flag of dr has one value or a list.")
    return entry.value if isinstance(entry.value, bool | None) else entry.text


def _words(flags: Table) -> list[str]:
    words: list[str] = []
    for name, entry in flags.items():
        value = entry.value
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list):
            words += [one.text for one in value]
        elif value is not True:
            words.append(entry.text)
    return words


def _choice(recipe: Recipe, name: str, known: Mapping[str, str]) -> str:
    found = recipe.text(name)
    if found not in known:
        raise ValueError(f"{recipe.name}: {name} must be one of {', '.join(known)}, not {found!r}.")
    return known[found]
