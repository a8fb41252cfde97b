"""What the arms begin from: a converted Hugging Face model, or a small one from scratch."""

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from megatron_dr.compare.jobs import digest
from megatron_dr.compare.plan import LOADED, SMALL, Start

END = "<|end|>"


def from_model(folder: Path, out: Path, console: Console) -> Start:
    """Convert a model, or keep what was converted from the same files.

    Raises:
        ValueError: what can't be converted.
    """
    from megatron_dr.hf import to_megatron

    plan = to_megatron.plan(folder, to_megatron.Layout(1, 1, 1))
    found = _digest(path for path in folder.iterdir() if path.is_file())
    kept, made = out / "model.sha256", out / "model"
    if not made.exists() or not kept.exists() or kept.read_text(encoding="utf-8") != found:
        console.print(f"converting {folder} to {made}", soft_wrap=True, markup=False)
        shutil.rmtree(made, ignore_errors=True)
        to_megatron.convert(plan, made)
        kept.write_text(found, encoding="utf-8")
    flags = (made / "hf" / "megatron_flags.txt").read_text(encoding="utf-8").strip()
    return Start(f"{LOADED} {flags} {_tokenizer(made / 'hf')}", made, found)


def from_scratch(tokenizer: Path | None, out: Path) -> Start:
    """A small GPT with a given tokenizer, or with one of bytes.

    Raises:
        ValueError: no tokenizer is there.
    """
    if tokenizer is None:
        tokenizer = byte_tokenizer(out / "tokenizer")
    elif not (tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"--tokenizer {tokenizer}: no folder with a tokenizer.json.")
    found = _digest(path for path in tokenizer.iterdir() if path.is_file())
    return Start(f"{SMALL} {_tokenizer(tokenizer.resolve())}", None, found)


def byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer whose tokens are the 256 bytes, and an end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(END, normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _tokenizer(folder: Path) -> str:
    return f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {shlex.quote(str(folder))}"


def _digest(paths: Iterable[Path]) -> str:
    """Of the names and the content of files."""
    found = [(path.name, digest(path)) for path in sorted(paths)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
