"""A recipe: what its TOML file says, and the flags of a run of it."""

import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SETTINGS = ("sft", "rlhf", "rlvr")


@dataclass(frozen=True)
class Recipe:
    """One of the paper's settings.

    Attributes:
        model, reward_model: the authors', by their names on the Hub.
        seeds: of the authors' runs.
        steps: of a run; `base_steps` of the small form's base model.
        data: what `prepare` takes of the authors' files.
        arms: name -> flags, with {parts} in them.
        parts: texts for flags; `all` is of every run.
        small: flags of the small form; none of the whole one. `small_model` of its base model, too.
        chosen: arms that run where none are named.
        template: a chat template's file in place of the tokenizer's own.
    """

    model: str
    reward_model: str | None
    seeds: tuple[int, ...]
    steps: int
    base_steps: int
    data: Mapping[str, Any]
    arms: Mapping[str, str]
    parts: Mapping[str, str]
    small: str
    small_model: str
    chosen: tuple[str, ...]
    template: Path | None

    def check(self, arm: str) -> None:
        """Raises ValueError for an arm that there is not."""
        if arm not in self.arms:
            raise ValueError(f"--arms {arm}: there are {', '.join(self.arms)}.")

    def flags(self, arm: str, files: Mapping[str, Any], steps: int | None = None) -> str:
        """Flags of `megatron_dr.train` but for the model's, the seed and what is loaded.

        Of a flag that is given twice the last one counts.

        Args:
            files: paths by the names that stand in braces: general, target, held_out, reward.
            steps: in place of the recipe's.
        """
        text = f"{{all}} {self.arms[arm]} {{template}} {self.small} --train-iters "
        text += str(steps or self.steps)
        known = {**self.parts, "template": _template(self.template)}
        known |= {name: shlex.quote(str(path)) for name, path in files.items()}
        while "{" in text:  # parts have parts
            text = text.format_map(known)
        return " ".join(text.split())


def read(setting: str, small: bool) -> Recipe:
    """The recipe, in its small form or whole."""
    found = tomllib.loads((HERE / f"{setting}.toml").read_text(encoding="utf-8"))
    less = found["small"]
    steps, chosen = (less["steps"], less["arms"]) if small else (found["steps"], found["arms"])
    has_template = small or found.get("template", False)  # the small model's tokenizer has none
    template = HERE / "chat.jinja" if has_template else None
    return Recipe(
        found["model"], found.get("reward_model"), tuple(found["seeds"]), steps, less["base_steps"],
        found["data"] | (less.get("data", {}) if small else {}), found["arms"],
        found["parts"] | (less.get("parts", {}) if small else {}),
        f"{less['model']} {less['flags']}" if small else "",
        f"{less['model']} {_template(template)}", tuple(chosen), template,
    )  # fmt: skip


def _template(path: Path | None) -> str:
    return "" if path is None else f"--chat-template {shlex.quote(str(path))}"
