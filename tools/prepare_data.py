"""Tokenise data for training: Megatron's indexed datasets with loss masks; docs/data.md.

    python tools/prepare_data.py DATA... --output PREFIX --tokenizer TOKENIZER

DATA: JSONL or Parquet files, folders of them, or Hugging Face datasets on disk. TOKENIZER: a folder
with a tokenizer.json, a sentencepiece .model file, or byte-level. A run that was cut off goes on
when the same command is given again.
"""

import argparse
import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from megatron_dr.data import prepare, records
from megatron_dr.data.chat import Chat
from megatron_dr.data.encode import COLUMNS, FORMS, Encoder, form_of
from megatron_dr.data.jsonl import parse_line
from megatron_dr.data.shards import Rules

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", nargs="+")
    parser.add_argument("--output", metavar="PREFIX", type=Path, required=True,
                        help="path of the output without endings")  # fmt: skip
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--chat-template", metavar="FILE", type=Path,
                        help="Jinja template in place of the tokenizer's own")  # fmt: skip
    parser.add_argument("--form", choices=FORMS, help="default: by the first record's columns")
    parser.add_argument("--columns", metavar="NAME=COLUMN", nargs="+", default=[],
                        help="what the data calls " + ", ".join(COLUMNS))  # fmt: skip
    parser.add_argument("--max-length", metavar="N", type=int,
                        help="most tokens of a sample: training's --seq-length + 1")  # fmt: skip
    parser.add_argument("--too-long", choices=("cut", "drop", "refuse"), default="cut",
                        help="what becomes of a longer one (default: cut the end)")  # fmt: skip
    parser.add_argument("--bad-lines", choices=("refuse", "skip"), default="refuse",
                        help="what becomes of a wrong line (default: refuse)")  # fmt: skip
    parser.add_argument("--validation", metavar="N", type=float, default=0.0, help="keep so many "
                        "samples, or below 1 this fraction, for PREFIX_validation")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the validation split")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--shard-size", metavar="N", type=int, default=10_000,
                        help="records that are worked on, and resumed, as one")  # fmt: skip
    parser.add_argument("--restart", action="store_true",
                        help="discard what an earlier run left under this output")  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("workers", "shard_size", "max_length"):
        least = 2 if name == "max_length" else 1
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.validation < 0 or (args.validation > 1 and args.validation % 1):
        parser.error("--validation must be a number of samples, or a fraction below 1")
    if args.max_length is None and args.too_long != "cut":
        parser.error(f"--too-long {args.too_long} needs --max-length")
    return args


def load_tokenizer(args: argparse.Namespace) -> tuple[Any, dict[str, str], str]:
    """Megatron's tokenizer, its name and hash, and the flags by which training takes the same."""
    from megatron.core.tokenizers import MegatronTokenizer

    name, path = args.tokenizer, Path(args.tokenizer)
    if name == "byte-level":
        tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": name})
        size = tokenizer.vocab_size - 1  # NullTokenizer adds one
        flags = f"NullTokenizer --vocab-size {size} --null-tokenizer-eod-id {tokenizer.eod}"
        return tokenizer, {"name": name}, flags
    if path.is_dir() and (path / "tokenizer.json").is_file():
        library, flag = "huggingface", "HuggingFaceTokenizer"
        files = [path / file for file in TOKENIZER_FILES if (path / file).is_file()]
    elif path.is_file() and path.suffix == ".model":
        library, flag, files = "sentencepiece", "SentencePieceTokenizer", [path]
    else:
        raise ValueError(
            f"--tokenizer {name}: neither a folder with a tokenizer.json, nor a sentencepiece "
            ".model file, nor byte-level."
        )
    try:
        tokenizer = MegatronTokenizer.from_pretrained(name, metadata_path={"library": library})
    except (ValueError, RuntimeError, OSError, TypeError) as error:
        raise ValueError(f"--tokenizer {name}: can't be read ({error}).") from None
    if tokenizer.eod is None or tokenizer.eod < 0:
        raise ValueError(f"--tokenizer {name}: has no end-of-text token (eos_token).")
    files += [args.chat_template] if args.chat_template else []
    digest = hashlib.sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files))
    flags = f"{flag} --tokenizer-model {name}"
    return tokenizer, {"name": name, "sha256": digest.hexdigest()}, flags


def load_chat(args: argparse.Namespace) -> Chat | None:
    """The chat template, if the tokenizer has one or one is given."""
    if not Path(args.tokenizer).is_dir():
        if args.chat_template:
            raise ValueError("--chat-template needs a tokenizer folder with a tokenizer.json.")
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if args.chat_template:
        tokenizer.chat_template = args.chat_template.read_text(encoding="utf-8")
    return Chat(tokenizer) if tokenizer.chat_template else None


def columns(renamed: list[str]) -> dict[str, str]:
    """What the data calls each of our columns."""
    names = dict(zip(COLUMNS, COLUMNS))
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
        for number, raw in records.read(piece):
            try:
                where = f"{piece.path}:{number}"
                return form_of(parse_line(where, raw) if isinstance(raw, bytes) else raw, names)
            except ValueError:  # refused or skipped when its turn comes
                continue
    return "sft"


def plan(args: argparse.Namespace, console: Console) -> tuple[prepare.Job, Any, str]:
    """The job of the command line, the tokenizer, and the training's flags for it."""
    names = columns(args.columns)
    paths = records.list_files(args.data)
    files = []
    for number, path in enumerate(paths):
        with console.status(f"reading {path}"):
            files.append(records.inspect(number, path, args.shard_size))
    tokenizer, identity, flags = load_tokenizer(args)
    form = args.form or first_form(files, names)
    rules = Rules(args.max_length, args.too_long, args.bad_lines == "skip")
    job = prepare.Job(
        prefix=args.output,
        files=files,
        encoder=Encoder(form, tokenizer, names, load_chat(args)),
        rules=rules,
        validation=args.validation,
        seed=args.seed,
        tokenizer=identity,
        piece_size=args.shard_size,
    )
    return job, tokenizer, flags


def run(args: argparse.Namespace, console: Console) -> None:
    """Prepare and report.

    Raises:
        ValueError: what can't be prepared, in one sentence.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

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
            job,
            IndexedDatasetBuilder,
            DType.optimal_dtype(tokenizer.vocab_size),
            args.workers,
            lambda count: progress.advance(task, count),
        )
    report(job, manifests, console)
    console.print(f"Train with --tokenizer-type {flags}", soft_wrap=True, highlight=False)


def report(job: prepare.Job, manifests: list[dict[str, Any]], console: Console) -> None:
    """The table of statistics, and what was cut, dropped and skipped."""
    table = Table("", title=f"{job.prefix} ({job.encoder.form})")
    columns = []
    for output, manifest in zip(job.outputs, manifests):
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


def main(argv: list[str] | None = None) -> None:
    """Run the command; a wrong input is one sentence and exit status 1."""
    args = arguments(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        run(args, Console())
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: stopped; the same command goes on from here.")


if __name__ == "__main__":
    main()
