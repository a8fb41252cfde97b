"""The documents name what there is, and show pictures that their script draws."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from megatron_dr.config import FEASIBLE_SETS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "feasible-sets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FEASIBLE_SETS)
def test_every_set_has_a_section(name: str) -> None:
    assert f"\n### {name}\n" in TEXT


def test_every_section_is_a_set() -> None:
    """What is said of a set is still said of one that exists."""
    assert set(re.findall(r"^### (\w+)$", TEXT, re.M)) == set(FEASIBLE_SETS)


def test_pictures_of_the_sets(tmp_path: Path) -> None:
    """The script draws the pictures that the text shows; the repository has these and no others."""
    runpy.run_path(str(DOCS / "feasible_sets.py"))["main"](tmp_path / "sets")
    drawn = sorted(path.name for path in (tmp_path / "sets").iterdir())
    assert drawn == sorted(re.findall(r"\]\(sets/([\w.-]+)\)", TEXT))
    assert drawn == sorted(path.name for path in (DOCS / "sets").iterdir())


def test_a_picture_shows_the_nearest_point() -> None:
    """Every panel's d is in its set, and of the shaded points none is nearer to t."""
    script = runpy.run_path(str(DOCS / "feasible_sets.py"))
    for panel in script["SHEET"]:
        if panel.title.split(",")[0] in ("topk", "greedy", "filter", "mean"):
            continue
        rows, t = torch.tensor(panel.rows).double(), torch.tensor(panel.target).double()
        d = script["project"](panel.set, rows, t[None])[0][0]
        assert (script["project"](panel.set, rows, d[None])[0][0] - d).norm() < 1e-6, panel.title
        x, y, away = script["distances"](panel.set, panel.rows)
        points = torch.cartesian_prod(x, y).view(len(x), len(y), 2).transpose(0, 1)
        nearest = (points[away < 1e-6] - t).norm(dim=1).min()
        assert (d - t).norm() <= nearest + 1e-6, panel.title
