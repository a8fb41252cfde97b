"""A tokenizer that has more ids than its model has words: refused, or the model widened.

Megatron's embedding is padded to a multiple of its ranks, so an id beyond the model's own words
finds a row, which is trained and which an export leaves out. So tokenizer and config.json are
compared wherever both are at hand: before a conversion, before an export, when a run starts.

A widened model has a row for each id. A new row is the mean of the model's own rows: with it the
new words begin at the mean of the logits, and not at 0, which would be far above most of them.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_dr.hf.mapping import Box
from megatron_dr.hf.model import Model
from megatron_dr.hf.source import Source
from megatron_dr.hf.unpickling import why

FLAG = "--widen-vocabulary"
_ROWS = 4096  # read at a time
_MOST = 2**31 - 1  # the largest id that can be meant
_WIDENED = ("model.embed_tokens.weight", "lm_head.weight")
_SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTS = ("additional_special_tokens", "extra_special_tokens")


def size(folder: Path) -> int | None:
    """1 + the largest id of the tokenizer whose files lie in a folder; None: they don't say it.

    What transformers' tokenizers have: the vocabulary, then in the order of their ids the tokens
    that other files name and the vocabulary lacks.

    Raises:
        ValueError: a damaged file.
    """
    whole, added, config, special, plain = (
        _read(folder / name) for name in (
            "tokenizer.json", "added_tokens.json", "tokenizer_config.json",
            "special_tokens_map.json", "vocab.json",
        )
    )  # fmt: skip
    known = _vocabulary(whole) or {k: i for k, i in plain.items() if isinstance(i, int)}
    numbered = _ids(added) | _ids({k: i for i, k in _contents(config)})
    largest = max([*known.values(), *numbered.values()], default=-1)
    if largest > _MOST:
        raise ValueError(f"{folder}: its tokenizer has ids above {_MOST}, which can't be meant.")
    if known:
        named = {*numbered, *_named(config), *_named(special)}
        return max(known.values()) + 1 + len(named - known.keys())
    return largest + 1 if numbered else None


def _read(path: Path) -> dict[str, Any]:
    """A table of a file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, not JSON ({why(error)}).") from None
    return found if isinstance(found, dict) else {}


def _vocabulary(whole: dict[str, Any]) -> dict[str, int]:
    """Ids by token of a tokenizer.json."""
    model = whole.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    ids = {}
    if isinstance(found, dict):
        ids = _ids(found)
    elif isinstance(found, list):  # (token, score)
        ids = {str(each[0]): n for n, each in enumerate(found) if isinstance(each, list) and each}
    listed = whole.get("added_tokens")
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, dict) and isinstance(each.get("id"), int):
            ids[str(each.get("content"))] = each["id"]
    return ids


def _ids(found: dict[str, Any]) -> dict[str, int]:
    return {token: number for token, number in found.items() if isinstance(number, int)}


def _contents(config: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Id and token of tokenizer_config.json's `added_tokens_decoder`."""
    found = config.get("added_tokens_decoder")
    for number, token in found.items() if isinstance(found, dict) else ():
        if number.isascii() and number.isdigit() and len(number) <= len(str(_MOST)):
            yield int(number), _content(token)


def _named(config: dict[str, Any]) -> Iterator[str]:
    """Special tokens that a file names."""
    for name in _SPECIAL:
        if config.get(name):
            yield _content(config[name])
    for name in _LISTS:
        listed = config.get(name)
        listed = list(listed.values()) if isinstance(listed, dict) else listed
        yield from map(_content, listed if isinstance(listed, list) else ())


def _content(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, dict) else str(token)


def words(folder: Path, model: Model, widen: bool) -> int:
    """Words that the model is to have: its own, or with `widen` as many as its tokenizer.

    Raises:
        ValueError: the tokenizer has more and `widen` is off, or it is on and there are none.
    """
    tokens = size(folder) or 0
    if tokens > model.vocabulary and not widen:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {tokens - 1}, but config.json's vocab_size is "
            f"{model.vocabulary}: take the model's own tokenizer, or have the model get words for "
            f"them by {FLAG}."
        )
    if tokens <= model.vocabulary and widen:
        raise ValueError(
            f"{folder}: {FLAG}, but its tokenizer has no more ids than the model has words: drop "
            "the flag."
        )
    return max(tokens, model.vocabulary)


class Widened(Source):
    """A source whose embedding and output layer have `words` rows, the new ones being their mean.

    Args:
        source: a checkpoint that was read and checked.
    """

    def __init__(self, source: Source, words: int) -> None:
        self.__dict__.update(source.__dict__)
        self.words = words
        self._means: dict[str, torch.Tensor] = {}

    def about(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        shape, dtype = super().about(name)
        return ((self.words, *shape[1:]) if name in _WIDENED else shape), dtype

    def read(self, name: str, box: Box) -> torch.Tensor:
        if name not in _WIDENED:
            return super().read(name, box)
        (first, end), columns = box
        own = super().about(name)[0][0]
        values = super().read(name, ((min(first, own), min(end, own)), columns))
        new = self._mean(name)[slice(*columns)].expand(end - first - len(values), -1)
        return torch.cat([values, new.to(values.dtype)])

    def _mean(self, name: str) -> torch.Tensor:
        """Of the rows, summed in fp64."""
        if name not in self._means:
            rows, columns = super().about(name)[0]
            total = torch.zeros(columns, dtype=torch.float64)
            for row in range(0, rows, _ROWS):
                box = ((row, min(row + _ROWS, rows)), (0, columns))
                total += super().read(name, box).double().sum(0)
            self._means[name] = total / rows
        return self._means[name]
