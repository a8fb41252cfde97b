"""What the arms begin from: a byte tokenizer made here, a converted model that is kept."""

from pathlib import Path

import transformers
from rich.console import Console

from megatron_dr.compare import start

from ..hf._convert import make

QUIET = Console(quiet=True)


def test_a_tokenizer_of_bytes(tmp_path: Path) -> None:
    folder = start.byte_tokenizer(tmp_path / "tokenizer")
    found = transformers.AutoTokenizer.from_pretrained(folder)
    text = "  El temor, 它\n\tя"
    ids = found(text).input_ids
    assert len(ids) == len(text.encode()) and found.decode(ids) == text
    assert len(found) == 257 and found.eos_token_id == 256
    assert start.from_scratch(folder, tmp_path).digest == start.from_scratch(None, tmp_path).digest


def test_a_model_is_converted_once(tmp_path: Path) -> None:
    """And again where its files have changed."""
    out = tmp_path / "out"
    out.mkdir()
    tracker = out / "model" / "latest_checkpointed_iteration.txt"
    make(tmp_path / "hf")
    first = start.from_model(tmp_path / "hf", out, QUIET)
    made = tracker.stat().st_mtime_ns
    assert "--num-layers 2" in first.flags and first.checkpoint == out / "model"
    assert start.from_model(tmp_path / "hf", out, QUIET) == first
    assert tracker.stat().st_mtime_ns == made
    (tmp_path / "hf" / "generation_config.json").write_text('{"max_length": 10}')
    assert start.from_model(tmp_path / "hf", out, QUIET).digest != first.digest
    assert tracker.stat().st_mtime_ns != made
