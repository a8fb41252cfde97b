"""Recipes are laid over one another, and what is none is refused with the nearest."""

from pathlib import Path

import pytest

from megatron_dr.launch.recipe import Recipe, names_of, read_recipe

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"


def read(name: str, *given: str) -> Recipe:
    return read_recipe(FOLDER, name, given)


def test_each_is_over_the_one_before() -> None:
    found = read("qwen3-30b-a3b/lora")
    assert found.name == "qwen3-30b-a3b/lora/8xh100"
    assert found.number("gpus") == 8 and found.number("layout", "ep") == 8  # of the size
    assert found.number("layout", "tp") == 1  # of common.yaml
    assert found.value("layout", "sp") is False  # of the method
    assert found.value("flags", "moe-grouped-gemm") is None  # of the method, on this model
    assert found.text("flags", "lr") == "1e-4" and found.text("flags", "clip-grad") == "1.0"
    other = read("qwen3-30b-a3b/lora", "flags.lr=2e-5", "dr.lora-rank=4", "layout.ep=4")
    assert other.text("flags", "lr") == "2e-5" and other.value("dr", "lora-rank") == 4
    assert other.number("layout", "ep") == 4 and other.text("flags", "clip-grad") == "1.0"
    assert read("llama-3.1-8b/sft/32xh100").number("batch", "global") == 256


def test_values_of_the_command_line_are_as_they_are() -> None:
    path = '/a b/$HOME/it\'s #1: "x".jsonl'
    found = read("mistral-7b/sft", f"data={path}", "steps=[train]", "flags.seed=null")
    assert found.text("data") == path and found.texts("steps") == ["train"]
    assert found.value("flags", "seed") is None


@pytest.mark.parametrize("name, given, says", [
    ("mistral-7b", (), "mistral-7b: a recipe is MODEL/METHOD or MODEL/METHOD/SIZE."),
    ("/sft", (), "/sft: a recipe is MODEL/METHOD or MODEL/METHOD/SIZE."),
    ("mistral-8b/sft", (), "the nearest is mistral-7b."),
    ("mistral-7b/dop", (), "the nearest is dpo."),
    ("llama-3.1-70b/sft/8xh100", (), "of llama-3.1-70b/sft there are 64xh100."),
    ("mistral-7b/sft", ("gpu=8",), "'gpu' is no key of a recipe; the nearest is 'gpus'."),
    ("mistral-7b/sft", ("layout.pt=8",), "layout.pt is no key of a recipe; the nearest is "),
    ("mistral-7b/sft", ("layout=8",), "layout of a recipe is a table: NAME.KEY=VALUE."),
    ("mistral-7b/sft", ("gpus.of=8",), "gpus of a recipe is one value or a list."),
    ("mistral-7b/sft", ("--lr",), "'--lr' is no key=value."),
    ("mistral-7b/sft", ("env.WANDB_API_KEY=x",), "env.WANDB_API_KEY would be written into a "
     "script: set it in your own environment"),
])  # fmt: skip
def test_what_is_none(name: str, given: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError) as refused:
        read(name, *given)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_without_recipes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no recipes are there; name their folder with --recipes"):
        read_recipe(tmp_path, "a/b", [])


def test_every_name_is_one() -> None:
    names = names_of(FOLDER)
    assert len(names) == len(set(names)) == 36
    assert all(read(name).name == name for name in names)
