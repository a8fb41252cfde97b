"""Recipes of examples/cluster with their sizes divided down, and what they train on."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_dr.config.yaml_file import plain
from megatron_dr.hf.config import parse
from megatron_dr.hf.mapping import hf_shapes, mapped_tensors
from megatron_dr.launch.recipe import Recipe, read_recipe

from ._train import ROOT, SENTENCES

FOLDER = ROOT / "examples" / "cluster"
WORDS = 320  # of the model; the tokenizer has fewer


def whole(name: str, *more: str) -> Recipe:
    """As it is written, with files that are not looked at."""
    files = ["hf=/no/where", "data=/no/general.jsonl", "target=/no/target.jsonl"]
    return read_recipe(FOLDER, name, [*files, *more])


def small(name: str, folder: Path, *more: str) -> Recipe:
    """The same layout with small sizes, on the CPU, with a model and data in the folder."""
    layout = divided(whole(name, *more))
    found = whole(name, *layout, *more)
    tp, pp = found.number("layout", "tp"), found.number("layout", "pp")
    ranks = found.number("gpus") // tp // pp // found.number("layout", "cp")
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2 * pp,
        "num_attention_heads": 8, "num_key_value_heads": max(tp, 2), "vocab_size": WORDS,
        "max_position_embeddings": 128, "head_dim": 8, "moe_intermediate_size": 32,
        "num_experts": 8,
    }  # fmt: skip
    sizes = [f"config.{n}={size}" for n, size in config.items() if n in found.of("config")]
    sizes += ["device=cpu", "precision=fp32", "batch.length=64", "batch.micro=1",
              f"batch.global={2 * ranks}", "flags.train-iters=2", "flags.lr-warmup-iters=1",
              "flags.eval-iters=0",
              f"target_dr.target-batch-size={ranks}"]  # fmt: skip
    if found.value("dr", "rl-algorithm"):
        sizes += [f"dr.rl-prompts={ranks}", "dr.rl-group=4", "dr.rl-max-tokens=6",
                  "dr.rl-reward=tests.mcore._rewards:vowels", "dr.rl-reward-workers=1",
                  f"dr.rl-target-prompts={ranks}"]  # fmt: skip
    paths = write_data(folder, name.split("/")[1])
    given = [f"{key}={path}" for key, path in paths.items()]
    made = read_recipe(
        FOLDER, name,
        [*layout, *sizes, f"hf={folder / 'hf'}", f"out={folder / 'out'}", *given, *more],
    )  # fmt: skip
    write_model(folder / "hf", plain(made.of("config")))
    return made


def divided(recipe: Recipe) -> list[str]:
    """For a layout of more than 8 GPUs one of 4 ranks, with the same sizes above 1, each 2."""
    if recipe.number("gpus") <= 8:
        return []
    sizes = {name: min(2, recipe.number("layout", name)) for name in ("tp", "pp", "ep")}
    return ["gpus=4", *(f"layout.{name}={size}" for name, size in sizes.items())]


def write_data(folder: Path, method: str) -> dict[str, Path]:
    paths = {}
    for key, count in (("data", 64), ("target", 32)):
        paths[key] = folder / f"{key}.jsonl"
        lines = [json.dumps(_record(n, method)) for n in range(count)]
        paths[key].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def _record(n: int, method: str) -> dict[str, Any]:
    prompt, text = f"{n}? ", f"{n} {SENTENCES[n % 4]}"
    if method == "dpo":
        return {"prompt": prompt, "chosen": text[:24], "rejected": f"{n}."}
    return {"prompt": prompt, "answer": n} if method == "grpo" else {"text": text}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """Random weights of that configuration, with the demo's tokenizer."""
    shutil.copytree(ROOT / "examples" / "sft" / "tokenizer", folder)
    family = config["architectures"][0].removesuffix("ForCausalLM")
    kind = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", family).lower()  # without one Llama 3.1 is refused
    written = config | {"torch_dtype": "float32", "model_type": kind}
    (folder / "config.json").write_text(json.dumps(written))
    torch.manual_seed(1)
    values = {
        name: torch.ones(shape) if "norm" in name else 0.05 * torch.randn(shape)
        for name, shape in hf_shapes(mapped_tensors(parse(config), 128)).items()
    }
    save_file(values, folder / "model.safetensors")
