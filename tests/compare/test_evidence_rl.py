"""`benchmarks/evidence/rl.py`: data that are apart, arms alike, and a table of its runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

FILE = Path(__file__).parents[2] / "benchmarks" / "evidence" / "rl.py"


@pytest.fixture(scope="module")
def rl() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence_rl", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    # other demos have modules of these names
    others = {name: sys.modules.pop(name, None) for name in ("demo", "rewards", "arithmetic")}
    spec.loader.exec_module(module)
    sys.path[:] = path
    for name, other in others.items():
        sys.modules.pop(name, None)
        if other is not None:
            sys.modules[name] = other
    return module


def test_no_sum_is_in_two_places(rl: ModuleType, tmp_path: Path) -> None:
    base, jobs = rl.plan(tmp_path, [11, 12], list(rl.ARMS))
    prompts = {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in tmp_path.glob("*.jsonl")
    }
    held_out = set(prompts["trusted"])
    assert prompts["trusted"] == prompts["doubtful"] and len(held_out) == 400
    for seed in ("11", "12"):
        target, general = set(prompts[f"target-{seed}"]), set(prompts[f"general-{seed}"])
        assert (len(target), len(general)) == (8, 492)
        assert not held_out & (target | general) and not target & general
    assert prompts["target-11"] != prompts["target-12"] and not held_out & set(prompts["base"])
    assert len({job.folder for job in (base, *jobs)}) == 1 + 2 * len(rl.ARMS)
    shared = [[flag for flag in job.flags if flag in ("--train-iters", "--lr", "--eval-interval")]
              for job in jobs]  # fmt: skip
    assert all(flags == shared[0] for flags in shared)


def test_differences_are_paired_with_the_best_mix(rl: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "rl.csv"
    rows = ["arm,seed,step,target reward,reward"]
    for arm, values in {"mix 0.1": (0.1, 0.2), "mix 0.2": (0.3, 0.5), "auto": (0.4, 0.6)}.items():
        rows += [f"{arm},{seed},{rl.STEPS},{v},0.5" for seed, v in zip((1, 2), values, strict=True)]
    path.write_text("\n".join([*rows, f"mix 0.1,1,{rl.STEPS // 3},0.9,0.5"]))
    console = Console(width=160, record=True)
    console.print(rl.table(path))
    said = console.export_text()
    assert "target reward beside mix 0.2" in said
    (line,) = [line for line in said.splitlines() if "auto" in line]
    assert "0.500 ± 0.100" in line and "0.100 ± 0.000" in line


def test_what_is_kept_is_what_the_docs_say(rl: ModuleType) -> None:
    console = Console(width=160, record=True)
    console.print(rl.table(FILE.parent / "results" / "rl.csv"))
    page = (FILE.parents[2] / "docs" / "rl.md").read_text(encoding="utf-8")
    for line in console.export_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) > 3 and "±" in cells[2]:
            assert cells[2] in page and cells[3] in page, line
