"""Whether a run's tokenizer, its model and the checkpoint that it came from fit together."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_dr.hf import assets, vocabulary
from megatron_dr.hf.config import read_config
from megatron_dr.hf.fields import whole


def largest_id(tokenizer: Any) -> int:
    """Of Megatron's tokenizer; its ids may have gaps, so that there are fewer than it."""
    library = getattr(tokenizer, "_tokenizer", None)
    hugging_face: Any = getattr(library, "tokenizer", None)
    if hasattr(hugging_face, "get_vocab"):
        return max(hugging_face.get_vocab().values(), default=-1)
    return int(tokenizer.vocab_size) - 1


def check(args: Namespace, tokenizer: Any) -> None:
    """That the model has a word of its own for each id, which an export keeps.

    Raises:
        ValueError: it lacks some, or the converted checkpoint that is loaded does.
    """
    tokens = largest_id(tokenizer) + 1
    rows = args.padded_vocab_size
    if rows is not None and tokens > rows:
        raise ValueError(
            f"the tokenizer has ids up to {tokens - 1}, but the model's embedding {rows} rows "
            "(--padded-vocab-size): take the model's own tokenizer, or convert the checkpoint "
            f"again with {vocabulary.FLAG}."
        )
    for place in filter(None, (args.load, args.pretrained_checkpoint)):
        folder = Path(place) / assets.FOLDER
        if (folder / "config.json").is_file():
            words = whole(read_config(folder), "vocab_size")
            if tokens > words:
                raise ValueError(
                    f"{folder}: the tokenizer has ids up to {tokens - 1}, but config.json's "
                    f"vocab_size is {words}, so rows of padding would be trained, which an export "
                    "leaves out: take the model's own tokenizer, or convert the model again, with "
                    f"the tokenizer beside it and {vocabulary.FLAG}."
                )
