"""What a record of weights says (`--dr-record FOLDER` of a run); docs/record.md.

    megatron-dr weights FOLDER                         of each corpus, and the samples at both ends
    megatron-dr weights FOLDER --csv samples.csv       of every sample, or --parquet
    megatron-dr weights FOLDER --blend                 a --train-data-path with these shares
    megatron-dr weights FOLDER --filter IN.jsonl OUT.jsonl --keep-above 0.8
    megatron-dr weights FOLDER --layers --png layers.png

A weight is a share: 1 is what the row has in the plain mean. Data that is not what the record was
made on is refused.
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_dr.cli.main import parser_of

FLAGS: dict[str, dict[str, Any]] = {
    "--top": {"type": int, "default": 10, "metavar": "N",
              "help": "samples shown of the most and of the least weight (default: 10)"},
    "--csv": {"type": Path, "metavar": "FILE", "help": "write every sample's mean weight there"},
    "--parquet": {"type": Path, "metavar": "FILE", "help": "as --csv, as Parquet"},
    "--blend": {"nargs": "?", "const": "-", "metavar": "FILE",
                "help": "each corpus' share of all weight as a blend: printed, or written to a "
                "file for Megatron's --data-args-path"},
    "--filter": {"nargs": 2, "type": Path, "metavar": ("IN", "OUT"),
                 "help": "write the lines of IN.jsonl that --keep-above or --keep-share keeps to "
                 "OUT.jsonl"},
    "--keep-above": {"type": float, "metavar": "W",
                     "help": "keep lines whose mean weight is above this"},
    "--keep-share": {"type": float, "metavar": "S",
                     "help": "keep this share of the lines, those of the largest mean weight"},
    "--layers": {"action": "store_true",
                 "help": "which layers carry weight, and whether the same samples do in each"},
    "--png": {"type": Path, "metavar": "FILE", "help": "with --layers, a picture too"},
}  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: flags that mean nothing together, or a number out of range.
    """
    parser = parser_of("weights", __doc__)
    parser.add_argument("folder", help="that --dr-record of a run named")
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args = parser.parse_args(argv)
    kept = [value for value in (args.keep_above, args.keep_share) if value is not None]
    if bool(args.filter) != bool(kept) or len(kept) > 1:
        raise ValueError("--filter needs one of --keep-above and --keep-share, and they need it.")
    if kept and not math.isfinite(kept[0]):
        raise ValueError(f"what is kept is a finite number, not {kept[0]}.")
    if args.keep_share is not None and not 0 < args.keep_share <= 1:
        raise ValueError(f"--keep-share must be above 0 and at most 1, not {args.keep_share}.")
    if args.png and not args.layers:
        raise ValueError("--png is of --layers: give it too.")
    if args.top < 1:
        raise ValueError(f"--top must be at least 1, not {args.top}.")
    return args


def run(args: argparse.Namespace, console: Console) -> None:
    """All that was asked for.

    Raises:
        ValueError: no record, or data that is not the record's.
    """
    from megatron_dr.report import contents, record, weights

    table = record.read(args.folder)
    note, samples = record.about(table), weights.samples(table)
    steps = table["step"].to_numpy()
    blocks = len(table["block"].unique())
    console.print(
        f"{args.folder}: {len(table):,} rows of {blocks:,} block(s) in steps {steps.min()} to "
        f"{steps.max()}", soft_wrap=True, highlight=False,
    )  # fmt: skip
    if note["left_out"]:
        console.print(
            f"note: {note['left_out']:,} rows between the most and the least weight are not in "
            "it (--dr-record-rows): means are of those that are", soft_wrap=True, highlight=False,
        )  # fmt: skip
    _written(samples, args)
    if args.filter:
        chooses = functools.partial(_threshold, args.keep_above, args.keep_share)
        source, out = args.filter
        found = contents.filtered(samples, note["files"], source, out, chooses)
        console.print(
            f"{out}: {found['kept']:,} lines kept, {found['below']:,} of less weight "
            f"and {found['unknown']:,} that the record has no weight of left out", soft_wrap=True,
            highlight=False,
        )  # fmt: skip
    if args.blend:
        _blend(args.blend, table, contents.check(samples, note["files"]), console)
    if args.layers:
        _layers(table, args.png, console)
    if not (args.filter or args.blend or args.layers or args.csv or args.parquet):
        _shown(weights.corpora(table), samples, args.top, console)


def _threshold(above: float | None, share: float | None, weights: list[float]) -> float:
    """Weights above it are kept; of equal ones at the border all are."""
    if above is not None:
        return above
    assert share is not None
    count = math.ceil(share * len(weights))
    return math.nextafter(sorted(weights, reverse=True)[count - 1], -math.inf)


def _written(samples: Any, args: argparse.Namespace) -> None:
    if args.csv:
        import pyarrow.csv

        pyarrow.csv.write_csv(samples, args.csv)
    if args.parquet:
        import pyarrow.parquet

        pyarrow.parquet.write_table(samples, args.parquet)


def _shown(corpora: Any, samples: Any, top: int, console: Console) -> None:
    table = Table("corpus", title="mean weight by corpus")
    for name in ("weight", "share", "score", "rows"):
        table.add_column(name, justify="right")
    for row in corpora.to_pylist():
        table.add_row(row["corpus"] or "?", *(_cell(row[n]) for n in ("weight", "share", "score")),
                      f"{row['rows']:,}")  # fmt: skip
    console.print(table)
    known = samples.filter(samples["hash"].is_valid())
    if not len(known):
        return
    rows = known.to_pylist() if len(known) <= 2 * top else [
        *known.slice(0, top).to_pylist(), None, *known.slice(len(known) - top).to_pylist()
    ]  # fmt: skip
    table = Table("sample", title=f"mean weight of {len(known):,} samples, the most and the least")
    for name in ("weight", "score", "rows"):
        table.add_column(name, justify="right")
    for row in rows:
        if row is None:
            table.add_section()
            continue
        place = row["file"] or row["corpus"] or "?"
        place += f":{row['line']}" if row["line"] is not None else ""
        place += f" ({row['id']})" if row["id"] is not None else ""
        table.add_row(place, _cell(row["weight"]), _cell(row["score"]), f"{row['rows']:,}")
    console.print(table)


def _cell(number: float | None) -> str:
    return "-" if number is None or math.isnan(number) else f"{number:.3f}"


def _blend(out: str, table: Any, missing: list[str], console: Console) -> None:
    from megatron_dr.report import weights

    found, without = weights.blend(table)
    for name in without:
        console.print(f"note: {name} has no positive weight, and is left out", soft_wrap=True)
    for file in missing:
        console.print(f"note: {file} is not here: it was not looked at", soft_wrap=True)
    text = " ".join(f"{weight:.5g} {path}" for path, weight in found.items())
    if out == "-":
        print(f"--train-data-path {text}")
    else:
        Path(out).write_text(text + "\n", encoding="utf-8")


def _layers(table: Any, png: Path | None, console: Console) -> None:
    from megatron_dr.report import weights

    found = weights.layers(table)
    for name, of in zip(("layer", "type"), found, strict=True):
        shown = Table(title="mean over rows, and rank correlation with the mean of all blocks")
        shown.add_column(name, overflow="fold")
        for column in ("blocks", "|weight|", "|weight - 1|", "Spearman"):
            shown.add_column(column, justify="right")
        for key, layer in of.items():
            numbers = (layer.magnitude, layer.moved, layer.spearman)
            shown.add_row(key, f"{layer.blocks:,}", *map(_cell, numbers))
        console.print(shown)
    if png:
        from megatron_dr.report.layers_picture import draw

        draw(*found, png)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code 0, or 2 after one sentence on what is wrong."""
    try:
        run(arguments(argv), Console())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        why = f"{error}"
        if isinstance(error, ModuleNotFoundError):
            why += ": pip install 'megatron_dr[data]', for --png 'megatron_dr[demo]'"
        print(f"weights: {why}", file=sys.stderr)
        return 2
    return 0
