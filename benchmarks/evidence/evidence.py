"""Is anybody worse off with `auto` than with a tuned plain mix? A command for each table.

    python benchmarks/evidence/evidence.py run pairs [--seeds 101 102 103] [--families mix auto]
    python benchmarks/evidence/evidence.py table pairs [--families general mix cone auto]

`run` does the training runs that are not finished in --out, and adds what they ended at to
--results; `table` reads those, and writes tables and a picture beside them. README.md has the
protocol. A table is of the seeds that all its families' arms have.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import case_runs
import cases
import measures
import picture
import psutil
import store
import tables
from families import FAMILIES
from rich.console import Console

from megatron_dr.compare import budget, launch

SEEDS = (101, 102, 103)


def train(table: str, seeds: list[int], families: list[str], out: Path, results: Path,
          console: Console) -> None:  # fmt: skip
    """What is left of a table's runs, seed by seed; and keep all that is finished.

    Raises:
        ValueError: runs failed: how many, and the first one's reason.
    """
    for folder in (out, results.parent):
        folder.mkdir(parents=True, exist_ok=True)
    arms = [arm for name in families for arm in FAMILIES[name]]
    found, jobs = [], []
    for seed in seeds:
        for case in cases.TABLES[table]:
            own, before = case_runs.runs(out, case, seed, arms)
            found += own
            jobs += [*before, *(run.job for run in own)]
    left = list({job.folder: job for job in jobs if not job.is_finished}.values())
    console.print(f"{len(left)} runs to do, of {len({job.folder for job in jobs})}; logs: {out}")
    try:
        if left:
            launch.train(left, out, console, case_runs.RANKS, _beside(len(left)), stop=False)
    finally:
        bases = {seed: case_runs.base(out, seed).fingerprint for seed in cases.BASES}
        done = [store.row(run, bases[run.case.base]) for run in found if run.job.is_finished]
        store.add(results, done)
        console.print(f"{len(done)} of {len(found)} results are in {results}")
    failed = [job for job in left if job.failure]
    if failed:
        raise ValueError(f"{len(failed)} runs failed: {failed[0].name}: {failed[0].failure}")


def _beside(count: int) -> int:
    """Runs at a time."""
    cores, free = len(os.sched_getaffinity(0)), psutil.virtual_memory().available
    return budget.beside(count, case_runs.RANKS, cores, free, case_runs.MEMORY)


def show(table: str, results: Path, console: Console, names: Sequence[str] = ()) -> None:
    """Write TABLE.md, TABLE.png and a table for each case, beside the results.

    Args:
        names: of families; none: all.
    """
    kept = {*(names or FAMILIES), store.BEFORE}
    rows = [row for row in store.read(results) if row.family in kept]
    found = [own for case in cases.TABLES[table] if (own := measures.gather(case, rows))]
    if not found:
        raise ValueError(f"{results}: no results of {table}: run it first.")
    for own in found:
        tables.families(own, results.parent / f"{own.case.name}.md", console)
    tables.verdicts(found, results.parent / f"{table}.md", console)
    title = ("All arms (small) and each family's best by validation (large, mean ± standard "
             "error)\nLines: general and the mixes; the cones. Lower left is better")  # fmt: skip
    picture.draw(found, title, results.parent / f"{table}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("table", choices=cases.TABLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="of the runs")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES),
                        help="of arms")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="of the runs")
    parser.add_argument("--results", type=Path, default=cases.HERE / "results" / "results.csv")
    options = parser.parse_args()
    console, out = Console(), options.out.resolve()
    try:
        if options.what == "run":
            train(options.table, options.seeds, options.families, out, options.results, console)
        else:
            show(options.table, options.results, console, options.families)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
