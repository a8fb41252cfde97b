"""Prompt and response are one text, and nothing is put around it twice: by ids and by decoding."""

from pathlib import Path
from typing import Any

import pytest
from megatron.core.tokenizers import MegatronTokenizer

from megatron_dr.data.encode import COLUMNS, Encoder
from megatron_dr.data.sample import Part

from . import _chat
from ._tokenizer import HuggingFace

NAMES = dict(zip(COLUMNS, COLUMNS, strict=True))


def encoded(tokenizer: Any, **record: str) -> Part:
    return Encoder("sft", tokenizer, NAMES, None)(record).parts[0]


def answer(part: Part) -> list[int]:
    return part.ids[part.mask == 1].tolist()


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize(
    "prompt, response",
    [
        ("Question: the cat?\nAnswer:\n", "four"), ("Answer:", "four"), ("Answer:", " four"),
        ("Answer:", "  four\n\n  four "), ("The cat ", "\nsat"), ("\n", "four"),
    ],
)  # fmt: skip
def test_ids_of_the_whole_text(kind: str, prompt: str, response: str) -> None:
    tokenizer = HuggingFace(_chat.spaced(kind))
    part = encoded(tokenizer, prompt=prompt, response=response)
    assert part.ids.tolist() == [*tokenizer.tokenize(prompt + response), tokenizer.eod]
    assert tokenizer.decode(answer(part)[:-1]).lstrip(" ") == response.lstrip(" ")
    assert answer(part)[-1] == tokenizer.eod


@pytest.mark.parametrize("kind", ["first", "always", "legacy"])
@pytest.mark.parametrize("prompt, response", [("the ca", "t sat"), ("Answer: ", "four")])
def test_a_token_across_the_edge_is_cut(kind: str, prompt: str, response: str) -> None:
    """The prompt is as it is alone, and no space comes between."""
    tokenizer = HuggingFace(_chat.spaced(kind))
    whole, alone = tokenizer.tokenize(prompt + response), tokenizer.tokenize(prompt)
    assert whole[: len(alone)] != alone
    part = encoded(tokenizer, prompt=prompt, response=response)
    assert part.ids[: len(alone)].tolist() == alone
    assert tokenizer.decode(part.ids.tolist()) == tokenizer.decode([*whole, tokenizer.eod])
    assert part.mask.tolist() == [0] * len(alone) + [1] * (len(part.ids) - len(alone))


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    name = _chat.sentencepiece_model(tmp_path)
    tokenizer = MegatronTokenizer.from_pretrained(name, metadata_path={"library": "sentencepiece"})
    for prompt, response in (("Hello:\n", "you"), ("Hello:", " you 東京"), ("Hello: ", "you")):
        part = encoded(tokenizer, prompt=prompt, response=response)
        ids = part.ids.tolist()
        assert tokenizer.detokenize(ids[:-1]) == prompt + response
        first = int(part.mask.argmax())
        assert tokenizer.detokenize(ids[:first]) == prompt
        if not prompt.endswith(" "):  # else a token of the whole is of both
            assert ids == [*tokenizer.tokenize(prompt + response), tokenizer.eod]


def test_trimmed_places() -> None:
    tokenizer = HuggingFace(_chat.trimming(None))
    prompt, response = "def f():\n", "    return  four\n"
    part = encoded(tokenizer, prompt=prompt, response=response)
    assert part.ids.tolist() == [*tokenizer.tokenize(prompt + response), tokenizer.eod]
    assert tokenizer.decode(answer(part)) == response + "<|im_end|>"


TURN = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("tail", ["", "\n"])
@pytest.mark.parametrize("begin", ["", "<s>"])
@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_begin_and_end_come_once(begin: str, end: str, tail: str) -> None:
    """In rendered texts, which have them; what follows the end has no loss."""
    tokenizer = HuggingFace(_chat.trimming(_chat.CHATML, bos=True))
    tail = tail if end else ""
    for record in (
        {"prompt": begin + TURN, "response": "four" + end + tail},
        {"text": begin + TURN + "four" + end + tail},
    ):
        part = encoded(tokenizer, **record)
        assert tokenizer.decode(part.ids.tolist()) == "<s>" + TURN + "four<|im_end|>" + tail
        shown = "four<|im_end|>" if "prompt" in record else TURN + "four<|im_end|>"
        assert tokenizer.decode(answer(part)) == shown


def test_a_rendered_prompt_for_rollouts() -> None:
    tokenizer = HuggingFace(_chat.trimming(None, bos=True))
    encoder = Encoder("prompts", tokenizer, NAMES, None)
    parts = [encoder({"prompt": p, "answer": 1}).parts[0] for p in (TURN, "<s>" + TURN)]
    assert parts[0].ids.tolist() == parts[1].ids.tolist() == tokenizer.tokenize(TURN)


def test_a_tokenizer_of_numbers() -> None:
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=10
    )
    with pytest.raises(ValueError, match="the tokenizer takes no text"):
        Encoder("sft", tokenizer, NAMES, None)
