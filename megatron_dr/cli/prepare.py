"""Tokenise data for training: Megatron's indexed datasets with loss masks; docs/data.md.

    megatron-dr prepare DATA... --output PREFIX --tokenizer TOKENIZER

DATA: files of JSON lines (.gz too) or a JSON array, Parquet files, folders of them, or Hugging Face
datasets on disk. TOKENIZER: a folder
with a tokenizer.json, a sentencepiece .model file, or byte-level. A run that was cut off goes on
when the same command is given again.
"""

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_dr.cli.main import parser_of
from megatron_dr.data import files, prepare, records
from megatron_dr.data.chat import Chat
from megatron_dr.data.chat_template import THOUGHTS, template_text
from megatron_dr.data.encode import COLUMNS, FORMS, Encoder, form_of
from megatron_dr.data.shards import Rules

FLAGS: dict[str, dict[str, Any]] = {
    "--output": {"metavar": "PREFIX", "type": Path, "required": True,
                 "help": "path of the output without endings"},
    "--tokenizer": {"required": True},
    "--chat-template": {"metavar": "FILE",
                        "help": "Jinja template in place of the tokenizer's own; qwen3: one of "
                        "this package, with marks"},
    "--thoughts": {"choices": THOUGHTS,
                   "help": "whose thoughts a template that knows of them keeps and trains on: of "
                   "the turns after the last question, of all turns, or none"},
    "--form": {"choices": FORMS, "help": "default: by the first record's columns"},
    "--columns": {"metavar": "NAME=COLUMN", "nargs": "+", "default": [],
                  "help": "what the data calls " + ", ".join(COLUMNS)},
    "--max-length": {"metavar": "N", "type": int,
                     "help": "most tokens of a sample: training's --seq-length + 1"},
    "--too-long": {"choices": ("cut", "drop", "refuse"), "default": "cut",
                   "help": "what becomes of a longer one (default: cut the end)"},
    "--bad-lines": {"choices": ("refuse", "skip"), "default": "refuse",
                    "help": "what becomes of a wrong line (default: refuse)"},
    "--validation": {"metavar": "N", "type": float, "default": 0.0,
                     "help": "keep so many samples, or below 1 this fraction, for "
                     "PREFIX_validation"},
    "--seed": {"type": int, "default": 0, "help": "of the validation split"},
    "--workers": {"type": int, "default": os.cpu_count() or 1, "help": "processes"},
    "--shard-size": {"metavar": "N", "type": int, "default": 10_000,
                     "help": "records that are worked on, and resumed, as one"},
    "--restart": {"action": "store_true",
                  "help": "discard what an earlier run left under this output"},
}  # fmt: skip


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("prepare", __doc__)
    parser.add_argument("data", metavar="DATA", nargs="+")
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args = parser.parse_args(argv)
    for name in ("workers", "shard_size", "max_length"):
        least = 2 if name == "max_length" else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 <= args.validation < math.inf or (args.validation > 1 and args.validation % 1):
        parser.error("--validation must be a number of samples, or a fraction below 1")
    if not -(2**63) <= args.seed < 2**63:
        parser.error("--seed must be a number of 64 bits")
    if args.max_length is None and args.too_long != "cut":
        parser.error(f"--too-long {args.too_long} needs --max-length")
    return args


def given_template(args: argparse.Namespace) -> str | None:
    """The text of the template that is given; None: the tokenizer's own."""
    if not args.chat_template and not args.thoughts:
        return None
    return template_text(args.chat_template, args.thoughts)


def load_chat(args: argparse.Namespace, template: str | None) -> Chat | None:
    """The chat template, if the tokenizer has one or one is given."""
    if not Path(args.tokenizer).is_dir():
        if template:
            raise ValueError("--chat-template needs a tokenizer folder with a tokenizer.json.")
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False)
    if template:
        tokenizer.chat_template = template
    return Chat(tokenizer) if tokenizer.chat_template else None


def columns(renamed: list[str]) -> dict[str, str]:
    """What the data calls each of our columns."""
    names = dict(zip(COLUMNS, COLUMNS, strict=True))
    for item in renamed:
        name, equals, column = item.partition("=")
        if name not in names or not equals or not column:
            raise ValueError(
                f"--columns {item}: give NAME=COLUMN, NAME one of {', '.join(COLUMNS)}."
            )
        names[name] = column
    return names


def first_form(files: list[records.InputFile], names: dict[str, str]) -> str:
    """The form of the first record that can be read."""
    for piece in (piece for file in files for piece in file.pieces):
        for _, raw in records.read(piece):
            try:
                return form_of(records.parse(raw), names)
            except ValueError:  # refused or skipped when its turn comes
                continue
    return "sft"


def plan(args: argparse.Namespace, console: Console) -> tuple[prepare.Job, Any, str]:
    """The job of the command line, the tokenizer, and the training's flags for it."""
    from megatron_dr.mcore.data.preparation import load_tokenizer

    names, template = columns(args.columns), given_template(args)
    paths = files.list_files(args.data)
    note = files.passed_over(args.data)
    if note:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    found = []
    for number, path in enumerate(paths):
        with console.status(f"reading {path}"):
            found.append(records.inspect(number, path, args.shard_size))
    tokenizer, identity, flags = load_tokenizer(args.tokenizer, template)
    form = args.form or first_form(found, names)
    encoder = Encoder(form, tokenizer, names, load_chat(args, template))
    rules = Rules(args.max_length, args.too_long, args.bad_lines == "skip")
    job = prepare.Job(args.output, found, encoder, rules, args.validation, args.seed, identity,
                      piece_size=args.shard_size)  # fmt: skip
    return job, tokenizer, flags


def run(args: argparse.Namespace, console: Console) -> None:
    """Prepare and report.

    Raises:
        ValueError: what can't be prepared, in one sentence.
    """
    from megatron_dr.mcore.data.preparation import open_dataset, token_type

    job, tokenizer, flags = plan(args, console)
    if args.restart:
        prepare.discard(job)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    task = progress.add_task("records", total=sum(file.records for file in job.files))
    with progress:
        manifests = prepare.prepare(
            job, open_dataset, token_type(tokenizer), args.workers,
            lambda count: progress.advance(task, count),
        )  # fmt: skip
    report(job, manifests, console)
    console.print(f"Train with --tokenizer-type {flags}", soft_wrap=True, highlight=False)


def report(job: prepare.Job, manifests: list[dict[str, Any]], console: Console) -> None:
    """The table of statistics, and what was cut, dropped and skipped."""
    table = Table("", title=f"{job.prefix} ({job.encoder.form})")
    columns = []
    for output, manifest in zip(job.outputs, manifests, strict=True):
        for part, found in manifest["statistics"].items():
            name = output.name + ("" if part == "tokens" else f"_{part}")
            table.add_column(name, justify="right")
            columns.append(found)
    for row in columns[0]:
        table.add_row(row.replace("_", " "), *(f"{found[row]:,}" for found in columns))
    console.print(table)
    counts = dict(manifests[0]["counts"])
    words = [f"{counts.pop('records', 0):,} records"]
    words += [f"{n:,} {'bad lines skipped' if why == 'bad' else why}" for why, n in counts.items()]
    words += [f"{manifests[0]['duplicates']:,} duplicates kept"]
    console.print("; ".join(words), soft_wrap=True, highlight=False)
    for line in manifests[0]["bad_lines"]:
        console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code 0; a wrong input ends the process with one sentence and 1."""
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        run(args, Console())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"prepare: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare: stopped; the same command goes on from here.")
    return 0
