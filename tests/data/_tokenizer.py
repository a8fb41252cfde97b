"""The examples' byte tokenizer, as Megatron's tokenizers look: `tokenize` and `eod`."""

from pathlib import Path

from transformers import AutoTokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "sft" / "tokenizer"


class ByteTokenizer:
    def __init__(self) -> None:
        self.hf = AutoTokenizer.from_pretrained(FOLDER)
        self.eod = self.hf.eos_token_id

    def tokenize(self, text: str) -> list[int]:
        return self.hf(text).input_ids

    def decode(self, ids: list[int]) -> str:
        return self.hf.decode(ids)
