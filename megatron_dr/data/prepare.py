"""Prepare data: plan, work in shards (resumed where a run was cut off), merge, split."""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dr.data import shards, split
from megatron_dr.data.encode import FORMS, Encoder
from megatron_dr.data.output import OpenDataset, Writer
from megatron_dr.data.records import InputFile, Piece

FORMAT = 2  # of the manifest and the shards, and of how samples are encoded


@dataclass(frozen=True)
class Job:
    """All that decides what the output is, bit for bit.

    Attributes:
        prefix: of the output.
        validation: samples for P_validation: a number, below 1 a fraction, 0 for no split.
        tokenizer: its name and hash, for the manifest.
    """

    prefix: Path
    files: list[InputFile]
    encoder: Encoder
    rules: shards.Rules
    validation: float
    seed: int
    tokenizer: dict[str, str]
    piece_size: int

    @property
    def partial(self) -> Path:
        """The folder of what is done so far."""
        return self.prefix.with_name(self.prefix.name + ".partial")

    @property
    def outputs(self) -> list[Path]:
        """Prefixes of the training output and, with a split, of the validation output."""
        held_out = self.prefix.with_name(self.prefix.name + "_validation")
        return [self.prefix, held_out] if self.validation else [self.prefix]

    def description(self) -> dict[str, Any]:
        """What two runs must share to give the same output."""
        return {
            "format": FORMAT,
            "form": self.encoder.form,
            "tokenizer": self.tokenizer,
            "files": [
                {"path": f.path, "sha256": f.sha256, "records": f.records} for f in self.files
            ],
            "columns": self.encoder.columns,
            **asdict(self.rules),
            "validation": self.validation,
            "seed": self.seed,
            "piece_size": self.piece_size,
        }


def prepare(
    job: Job, open_dataset: OpenDataset, token_type: type, workers: int,
    progress: Callable[[int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Write the outputs; the manifests. What an earlier run finished is not done again.

    Args:
        progress: called with a number of records whenever so many are done.

    Raises:
        ValueError: a wrong line, no sample left, or what an earlier run left does not fit.
    """
    finished = check_earlier(job)
    if finished:
        progress(sum(file.records for file in job.files))
        return finished
    plan = job.partial / "plan.json"
    if not plan.exists():
        shutil.rmtree(job.partial, ignore_errors=True)  # shards without a plan say nothing
        job.partial.mkdir(parents=True)
        shards.write_whole(plan, json.dumps(job.description()).encode())
    pieces = [piece for file in job.files for piece in file.pieces]
    missing = [n for n in range(len(pieces)) if not _shard(job, n).exists()]
    progress(sum(p.count for p in pieces) - sum(pieces[n].count for n in missing))
    for piece in _worked(job, [(n, pieces[n]) for n in missing], workers):
        progress(piece.count)
    manifests = _merge(job, pieces, open_dataset, token_type)
    shutil.rmtree(job.partial)
    return manifests


def check_earlier(job: Job) -> list[dict[str, Any]]:
    """The manifests of a run that has finished this job, or an empty list.

    Raises:
        ValueError: files of another job under the output's name.
    """
    wanted = json.loads(json.dumps(job.description()))
    plan = job.partial / "plan.json"
    if plan.exists():
        _refuse_changes(plan, _read(plan), wanted)
        return []
    paths = [path.with_name(path.name + ".json") for path in job.outputs]
    found = {path: _read(path) for path in paths if path.exists()}
    for path, manifest in found.items():
        _refuse_changes(path, manifest, wanted)
    if len(found) == len(paths):
        return list(found.values())
    for output in job.outputs:
        for part in FORMS[job.encoder.form]:
            path = output.with_name(output.name + part + ".bin")
            if path.exists():
                raise ValueError(
                    f"{path} exists and is no finished output of this tool: name another output "
                    "or give --restart to replace it."
                )
    return []


def _read(path: Path) -> dict[str, Any]:
    """What an earlier run wrote of itself.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("files"), list):
        raise ValueError(
            f"{path}: no description of an earlier run, or damaged: name another output, or start "
            "anew with --restart."
        )
    return found


def discard(job: Job) -> None:
    """Remove what an earlier run left, finished or not, so that the job starts anew."""
    shutil.rmtree(job.partial, ignore_errors=True)
    for output in job.outputs:
        output.with_name(output.name + ".json").unlink(missing_ok=True)
        for part in FORMS[job.encoder.form]:
            output.with_name(output.name + part + ".bin").unlink(missing_ok=True)


def _refuse_changes(path: Path, earlier: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = [name for name in wanted if earlier.get(name) != wanted[name]]
    if not changed:
        return
    what = ", ".join(changed)
    if "format" in changed:
        what = "how samples are encoded (it is of another version of this tool)"
    if changed == ["files"]:
        listed = [file for file in earlier["files"] if isinstance(file, dict)]
        before = {str(file.get("path")): file.get("sha256") for file in listed}
        now = {file["path"]: file["sha256"] for file in wanted["files"]}
        differ = [p for p in before | now if before.get(p) != now.get(p)]
        what = f"the input ({', '.join(differ) or 'order of files'})"
    raise ValueError(
        f"{path} is of a run with other settings; changed since: {what}. Give what that run was "
        "given, name another output, or start anew with --restart."
    )


def _shard(job: Job, number: int) -> Path:
    return job.partial / f"shard-{number:06d}.npz"


def _worked(job: Job, todo: list[tuple[int, Piece]], workers: int) -> Iterator[Piece]:
    """Work the pieces through and save their shards; pieces, as they are done, in order."""
    if workers == 1 or len(todo) < 2:
        yield from map(partial(_work_one, job), todo)
        return
    # Forked, the workers have the tokenizer at once; the tokenizers library's own threads, which
    # a fork would lose, are off.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, len(todo)), context, _end_with_parent, (job,))
    try:
        yield from pool.map(_work_in_worker, todo)
    except BrokenProcessPool:
        raise ValueError(
            "a worker was killed (out of memory?): run the same command again, with fewer "
            "--workers, and it goes on where it stopped."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_job: Job | None = None  # of this worker


def _end_with_parent(job: Job) -> None:
    """Start of a worker: know the job, and end with the parent, also if that is killed."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int = parent.sentinel) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work_in_worker(item: tuple[int, Piece]) -> Piece:
    assert _job is not None
    return _work_one(_job, item)


def _work_one(job: Job, item: tuple[int, Piece]) -> Piece:
    number, piece = item
    shards.work(piece, job.encoder, job.rules).save(_shard(job, number))
    return piece


def _merge(
    job: Job, pieces: list[Piece], open_dataset: OpenDataset, token_type: type
) -> list[dict[str, Any]]:
    contents, counts, bad_lines = [], Counter[str](), list[str]()
    for n in range(len(pieces)):
        shard = shards.Shard.load(_shard(job, n))
        contents.append(shard.contents)
        counts += shard.counts
        bad_lines = (bad_lines + shard.bad_lines)[: shards.SHOWN]
    hashes = np.concatenate([np.empty((0, 16), np.uint8), *contents])
    if not len(hashes):
        raise ValueError(f"no sample is left of {counts['records']} records ({dict(counts)}).")
    held_out = np.zeros(len(hashes), bool)
    if job.validation:
        held_out = split.validation(hashes, job.validation, job.seed)
    folder = job.partial / "output"
    shutil.rmtree(folder, ignore_errors=True)
    writers = []
    for output in job.outputs:
        (folder / output.name).mkdir(parents=True)
        form = FORMS[job.encoder.form]
        writers.append(Writer(output, folder / output.name, form, open_dataset, token_type))
    first = 0
    for n, piece in enumerate(pieces):
        shard = shards.Shard.load(_shard(job, n))
        side = held_out[first : first + len(shard.lines)]
        for writer, chosen in zip(writers, (~side, side), strict=False):
            writer.add(shard, piece.file, chosen)
        first += len(shard.lines)
    duplicates = len(hashes) - len(np.unique(hashes, axis=0))
    shared = {"counts": dict(sorted(counts.items())), "duplicates": duplicates}
    manifest = job.description() | shared | {"bad_lines": bad_lines}
    return [writer.finish(manifest) for writer in writers]
