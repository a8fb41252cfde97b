"""What preparing data takes from Megatron: its tokenizers and the writer of indexed datasets."""

import hashlib
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer

from megatron_dr.data.output import OpenDataset
from megatron_dr.mcore.data.vocabulary import largest_id

open_dataset: OpenDataset = IndexedDatasetBuilder

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip


def token_type(tokenizer: Any) -> type:
    """The smallest type that holds its token ids."""
    found: type = DType.optimal_dtype(largest_id(tokenizer) + 1)
    return found


def load_tokenizer(name: str, template: str | None) -> tuple[Any, dict[str, str], str]:
    """Megatron's tokenizer, its name and hash, and the flags by which training takes the same.

    Args:
        name: a folder with a tokenizer.json, a sentencepiece .model file, or byte-level.
        template: a chat template's text, hashed too.

    Raises:
        ValueError: none of these, or one that can't be read or has no end-of-text token.
    """
    path = Path(name)
    if name == "byte-level":
        tokenizer = MegatronTokenizer.from_pretrained(metadata_path={"library": name})
        size = tokenizer.vocab_size - 1  # NullTokenizer adds one
        flags = f"NullTokenizer --vocab-size {size} --null-tokenizer-eod-id {tokenizer.eod}"
        return tokenizer, {"name": name}, flags
    if path.is_dir() and (path / "tokenizer.json").is_file():
        library, flag = "huggingface", "HuggingFaceTokenizer"
        files = [path / file for file in TOKENIZER_FILES if (path / file).is_file()]
        files += sorted((path / "additional_chat_templates").glob("*.jinja"))
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
    held = [file.read_bytes() for file in files] + ([template.encode()] if template else [])
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in held))
    flags = f"{flag} --tokenizer-model {name}"
    return tokenizer, {"name": name, "sha256": digest.hexdigest()}, flags
