"""The command in this process, and what it writes as Megatron reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_dr.cli.prepare import main

ROOT = Path(__file__).parents[2]
BYTES = str(ROOT / "examples" / "sft" / "tokenizer")


def command(data: Any, prefix: Path, *flags: Any, tokenizer: str = BYTES) -> list[str]:
    """Its arguments; data: one path or several."""
    paths = data if isinstance(data, list) else [data]
    if "--workers" not in flags:
        flags = ("--workers", 1, *flags)
    return [str(x) for x in (*paths, *flags, "--output", prefix, "--tokenizer", tokenizer)]


def prepare(data: Any, prefix: Path, *flags: Any, tokenizer: str = BYTES) -> dict[str, Any]:
    """Run it; the manifest."""
    main(command(data, prefix, *flags, tokenizer=tokenizer))
    assert not prefix.with_name(prefix.name + ".partial").exists()
    manifest: dict[str, Any] = json.loads(Path(f"{prefix}.json").read_text())
    return manifest


def documents(prefix: Path, part: str = "") -> list[tuple[list[int], list[int]]]:
    """(token ids, mask) of every document, by Megatron's reader; one sequence in each."""
    tokens, mask = IndexedDataset(f"{prefix}{part}"), IndexedDataset(f"{prefix}{part}_loss_mask")
    for dataset in (tokens, mask):
        assert dataset.document_indices.tolist() == list(range(len(tokens) + 1))
    assert mask.index.dtype == np.uint8
    assert tokens.sequence_lengths.tolist() == mask.sequence_lengths.tolist()
    return [(tokens[n].tolist(), mask[n].tolist()) for n in range(len(tokens))]


def sources(prefix: Path) -> list[list[int]]:
    """(file, line) of every sample."""
    found: list[list[int]] = np.load(f"{prefix}_source.npy", allow_pickle=False).tolist()
    return found


def write(path: Path, lines: list[Any]) -> Path:
    """A JSONL file of objects, and of strings as they are."""
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in text), encoding="utf-8")
    return path


def outputs(folder: Path, prefix: str) -> dict[str, bytes]:
    """Every file of an output, by the rest of its name."""
    found = sorted(folder.glob(f"{prefix}[._]*"))
    return {p.name.removeprefix(prefix): p.read_bytes() for p in found if p.is_file()}
