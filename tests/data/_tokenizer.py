"""Tokenizers as Megatron's look: `tokenize`, `detokenize` and `eod`."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "sft" / "tokenizer"


class HuggingFace:
    """Of transformers' tokenizer, as Megatron's class holds it."""

    def __init__(self, hf: Any) -> None:
        self.hf, self.eod = hf, hf.eos_token_id
        self._tokenizer = SimpleNamespace(tokenizer=hf)

    def tokenize(self, text: str) -> list[int]:
        return self.hf(text).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids)

    detokenize = decode


class ByteTokenizer(HuggingFace):
    """The examples' byte tokenizer."""

    def __init__(self) -> None:
        super().__init__(AutoTokenizer.from_pretrained(FOLDER))
