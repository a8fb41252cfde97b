"""The files that a recipe's run reads, as its flags name them, and whether they are there."""

import re
from pathlib import Path

from megatron_dr.config.target_sets import parsed
from megatron_dr.config.yaml_file import Entry
from megatron_dr.launch.recipe import Recipe

KEYS = ("data", "valid", "target", "target_valid")
_ENDS = ("", ".idx", "_chosen.idx")  # of files and folders, of prepared samples, of pairs
_BY_NAME = ("target", "target_valid")
_NUMBER = re.compile(r"\d*\.?\d+(e-?\d+)?")


def by_flag(recipe: Recipe) -> dict[str, list[str]]:
    """Each flag's words, paths made absolute; a flag of ours begins with dr.

    Raises:
        ValueError: no general data, or a list that is no blend and no sets by name.
    """
    if not recipe.has("data"):
        raise ValueError(f"{recipe.name} needs data=FILE, the general data; target=FILE names the "
                         "target's.")  # fmt: skip
    return {recipe.text("files", key): words(recipe, key) for key in KEYS if recipe.has(key)}


def words(recipe: Recipe, key: str) -> list[str]:
    """Of a blend weights and paths, of target sets NAME=PATH, else one path."""
    entry = recipe.table[key]
    entries = entry.value if isinstance(entry.value, list) else [Entry(entry.text, entry.text, 0)]
    if not entries or any(isinstance(one.value, list | dict | None) for one in entries):
        raise ValueError(f"{key} must be a path or a list of them, not {entry.text or 'this'}.")
    if key in _BY_NAME:
        given = parsed(key, [one.text for one in entries])
        return [f"{name}={_whole(path)}" if name else _whole(path)
                for name, path in ([("", given)] if isinstance(given, str) else given)]  # fmt: skip
    if not isinstance(entry.value, list):
        _check_one(key, entry.text)
    weights = [isinstance(one.value, int | float) for one in entries]
    if any(weights) and weights != [True, False] * (len(weights) // 2):
        raise ValueError(
            f"{key} must have a weight before each path or before none: "
            f"{key}=[0.7,a.jsonl,0.3,b.jsonl]."
        )
    return [one.text if weight else _whole(one.text)
            for one, weight in zip(entries, weights, strict=True)]  # fmt: skip


def _check_one(key: str, text: str) -> None:
    """Raise ValueError for a blend as one text, unless a file has that name."""
    parts = re.split(r"[\s,]+", text.strip(" ,"))
    if len(parts) % 2 or not all(map(_NUMBER.fullmatch, parts[::2])) or _there(text):
        return
    raise ValueError(
        f"{key}={text!r} is one path: give a blend as a list, {key}=[{','.join(parts)}]."
    )


def corpora(recipe: Recipe) -> int:
    """How many general corpora there are."""
    return sum(Path(word).is_absolute() for word in words(recipe, "data"))


def check(recipe: Recipe, base: Path) -> None:
    """Raise ValueError where a file that the run begins with is not there.

    Args:
        base: the converted model, which needs no other where it is there.
    """
    steps = recipe.texts("steps")
    hf = Path(recipe.text("hf"))
    if "in" in steps and not base.exists() and not (hf / "config.json").is_file():
        raise ValueError(f"hf={hf}: there is no config.json: name a Hugging Face model's folder.")
    for key in KEYS if "train" in steps else ():
        for word in words(recipe, key) if recipe.has(key) else ():
            path = word[word.find("/") :] if "/" in word else ""  # of NAME=PATH; of a weight none
            if path and not _there(path):
                raise ValueError(
                    f"{key}: {path} is not there: name a file or folder of samples, or an indexed "
                    "dataset without .bin."
                )


def _there(path: str) -> bool:
    return any(Path(path + end).exists() for end in _ENDS)


def _whole(path: str) -> str:
    return str(Path(path).absolute())
