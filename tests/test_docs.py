"""The documents name what there is, and show what their scripts make."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from megatron_dr.config.kinds import FEASIBLE_SETS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "examples").rglob("*.md")]
FOLDERS = "megatron_dr|tests|tools|docs|examples|benchmarks"
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


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths(page: Path) -> None:
    """Every link inside the repository leads somewhere, every file that is named exists."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for link in (link for link in links if not re.match(r"\w+:", link)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_where_to_read_on() -> None:
    """Each row of the table names files: the first by its path, the others from its folder."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where to read on")[2]
    rows = [re.findall(r"`([\w./-]+\.\w+)`", row) for row in table.splitlines() if "`" in row]
    assert len(rows) > 5
    for first, *others in rows:
        assert (ROOT / first).is_file(), first
        assert all(((ROOT / first).parent / other).is_file() for other in others), others


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in DOCS.glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\]\(([\w-]+\.md)\)", index)
    )


def test_the_api_page_is_what_the_docstrings_say() -> None:
    """`make docs` writes it anew."""
    page = runpy.run_path(str(DOCS / "api.py"))["page"]()
    assert page == (DOCS / "api.md").read_text(encoding="utf-8")


def test_the_tables_of_scale_are_what_the_plan_says() -> None:
    """`python docs/scale.py` writes them anew."""
    script, page = runpy.run_path(str(DOCS / "scale.py")), (DOCS / "scale.md").read_text("utf-8")
    for made in (script["tables"](), script["kernels"]()):
        assert made in page


def test_the_tables_of_plan_are_what_the_plan_says() -> None:
    """`python docs/plan.py` writes them anew."""
    made = runpy.run_path(str(DOCS / "plan.py"))["tables"]()
    assert made in (DOCS / "plan.md").read_text(encoding="utf-8")
