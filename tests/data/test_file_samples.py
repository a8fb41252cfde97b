"""What a record of a file becomes: which tokens have a loss, and how wrong ones are refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from megatron_dr.data.file_samples import FileSamples

from ._tokenizer import ByteTokenizer

LENGTH = 32
END = "<|end|>"
UNICODE = "Zürich → 東京 🙂 e\u0301"


@pytest.fixture(scope="module")
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def write(folder: Path, *lines: Any) -> str:
    """A file of lines: objects as JSON, bytes as they are."""
    raw = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path = folder / "data.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return str(path)


def one(folder: Path, tokenizer: ByteTokenizer, line: Any, length: int = LENGTH) -> Any:
    samples = FileSamples(write(folder, line), tokenizer, length)
    assert len(samples) == 1
    return samples[0]


def trained(sample: dict[str, torch.Tensor], tokenizer: ByteTokenizer) -> str:
    """The labels that have a loss, decoded."""
    return tokenizer.decode(sample["labels"][sample["loss_mask"] == 1].tolist())


def context(sample: dict[str, torch.Tensor], tokenizer: ByteTokenizer) -> str:
    """What the model has read when it predicts the first label that has a loss, decoded."""
    first = int(sample["loss_mask"].argmax())
    return tokenizer.decode(sample["tokens"][: first + 1].tolist())


@pytest.mark.parametrize("text", ["A plain sentence.", UNICODE, " spaces, kept \n"])
def test_text_is_trained_on_whole(tmp_path: Path, tokenizer: ByteTokenizer, text: str) -> None:
    sample = one(tmp_path, tokenizer, {"text": text}, length=64)
    first = sample["tokens"][:1].tolist()  # the first token has nothing before it
    labels = sample["labels"][sample["loss_mask"] == 1].tolist()
    assert tokenizer.decode(first + labels) == text + END
    assert labels[-1] == tokenizer.eod


@pytest.mark.parametrize("prompt, response", [("Two plus two? ", "Four."), ("Où? ", UNICODE)])
def test_response_alone_is_trained_on(
    tmp_path: Path, tokenizer: ByteTokenizer, prompt: str, response: str
) -> None:
    line = {"prompt": prompt, "response": response}
    sample = one(tmp_path, tokenizer, line, length=64)
    assert trained(sample, tokenizer) == response + END
    assert context(sample, tokenizer) == prompt


def test_utf8_as_it_is_and_escaped_are_the_same(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    raw = json.dumps({"text": UNICODE}, ensure_ascii=False).encode()
    path = write(tmp_path, raw, {"text": UNICODE})
    samples = FileSamples(path, tokenizer, 64)
    assert torch.equal(samples[0]["tokens"], samples[1]["tokens"])


def test_labels_are_the_next_tokens(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    sample = one(tmp_path, tokenizer, {"prompt": "abc", "response": "defg"})
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["position_ids"].tolist() == list(range(LENGTH))
    assert {name: tuple(value.shape) for name, value in sample.items()} == dict.fromkeys(
        ("tokens", "labels", "loss_mask", "position_ids"), (LENGTH,)
    )


def test_padding_has_no_loss(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    sample = one(tmp_path, tokenizer, {"text": "abcd"})  # 5 tokens with the end: 4 labels
    assert sample["loss_mask"].tolist() == [1.0] * 4 + [0.0] * (LENGTH - 4)
    assert (sample["tokens"][5:] == tokenizer.eod).all()
    assert (sample["labels"][4:] == tokenizer.eod).all()


def test_long_text_is_cut_on_the_right(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    text = "0123456789" * 4
    path = write(tmp_path, {"text": text}, {"text": "short"})
    samples = FileSamples(path, tokenizer, LENGTH)
    assert samples.num_cut == 1
    assert tokenizer.decode(samples[0]["tokens"].tolist()) == text[:LENGTH]
    assert trained(samples[0], tokenizer) == text[1 : LENGTH + 1]  # no end token
    assert trained(samples[1], tokenizer) == "hort" + END


@pytest.mark.parametrize("size, cut", [(LENGTH, 0), (LENGTH + 1, 1)])
def test_cut_begins_where_the_end_token_no_longer_fits(
    tmp_path: Path, tokenizer: ByteTokenizer, size: int, cut: int
) -> None:
    samples = FileSamples(write(tmp_path, {"text": "x" * size}), tokenizer, LENGTH)
    assert samples.num_cut == cut
    assert (samples[0]["labels"][-1] == tokenizer.eod) == (cut == 0)


def test_a_prompt_may_leave_room_for_one_token(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    line = {"prompt": "p" * LENGTH, "response": "response"}
    sample = one(tmp_path, tokenizer, line)
    assert trained(sample, tokenizer) == "r"
    assert context(sample, tokenizer) == "p" * LENGTH


def test_an_empty_prompt_is_no_context(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    sample = one(tmp_path, tokenizer, {"prompt": "", "response": "abc"})
    assert trained(sample, tokenizer) == "bc" + END


# (the line, what the message says after path:line)
WRONG = {
    "not JSON": (b'{"text": "a"', "not JSON"),
    "two objects": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"text": "a"}', "not JSON"),
    "list": (["text"], "must be a JSON object, not list"),
    "string": ("text", "must be a JSON object, not str"),
    "null": (None, "must be a JSON object, not NoneType"),
    "no field": ({}, "this one has no column"),
    "other field": ({"content": "a"}, "this one has 'content'"),
    "both kinds": ({"text": "a", "prompt": "b", "response": "c"}, "one of 'text', 'prompt'"),
    "text and response": ({"text": "a", "response": "c"}, "one of 'text', 'prompt'"),
    "number": ({"text": 3}, "'text' must be a string"),
    "no response": ({"prompt": "a"}, "this one has 'prompt'"),
    "messages": ({"messages": [{"role": "user", "content": "a"}]}, "need a tokenizer with a chat"),
    "no prompt": ({"response": "a"}, "'prompt' must be a string"),
    "prompt null": ({"prompt": None, "response": "a"}, "'prompt' must be a string"),
    "response list": ({"prompt": "a", "response": ["b"]}, "'response' must be a string"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "blank text": ({"text": " \n\t"}, "'text' is empty"),
    "empty response": ({"prompt": "a", "response": ""}, "'response' is empty"),
    "not UTF-8": ('{"text": "é"}'.encode("latin-1"), "not UTF-8"),
    "cut UTF-8": ('{"text": "é'.encode()[:-1], "not UTF-8"),
    "prompt too long": (
        {"prompt": "p" * (LENGTH + 1), "response": "a"},
        f"the prompt has {LENGTH + 1} tokens and leaves no room",
    ),
}


@pytest.mark.parametrize("line, message", WRONG.values(), ids=WRONG)
def test_wrong_line_is_refused(
    tmp_path: Path, tokenizer: ByteTokenizer, line: Any, message: str
) -> None:
    path = write(tmp_path, {"text": "good"}, line, {"text": "good"})
    with pytest.raises(ValueError) as error:
        FileSamples(path, tokenizer, LENGTH)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_blank_lines_are_skipped_but_counted(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    good = [b"", {"text": "one"}, b"  \t", b"\r", {"text": "two"}, b""]
    samples = FileSamples(write(tmp_path, *good), tokenizer, LENGTH)
    assert [trained(s, tokenizer) for s in samples] == ["ne" + END, "wo" + END]
    path = write(tmp_path, *good, {"text": 1})
    with pytest.raises(ValueError, match=f"{path}:7: "):
        FileSamples(path, tokenizer, LENGTH)


def test_crlf_and_no_newline_at_the_end(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n{"text": "two"}')
    samples = FileSamples(str(path), tokenizer, LENGTH)
    assert [trained(s, tokenizer) for s in samples] == ["ne" + END, "wo" + END]


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_file_without_samples(tmp_path: Path, tokenizer: ByteTokenizer, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: the file has no samples"):
        FileSamples(str(path), tokenizer, LENGTH)


def test_missing_file(tmp_path: Path, tokenizer: ByteTokenizer) -> None:
    for name, said in (("missing.jsonl", "no such file"), ("", "no .jsonl or .parquet file in it")):
        with pytest.raises(ValueError, match=f"^{tmp_path / name}: {said}"):
            FileSamples(str(tmp_path / name), tokenizer, LENGTH)


def test_parquet_without_pyarrow(
    tmp_path: Path, tokenizer: ByteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a.parquet needs pyarrow: pip install"):
        FileSamples(str(tmp_path / "a.parquet"), tokenizer, LENGTH)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b'{"text": "half of a pair: \\ud83d"}', id="lone surrogate"),
        pytest.param(b'{"text": "a", "id": ' + b"9" * 5000 + b"}", id="5000 digits"),
        pytest.param(b'{"text": "a", "id": ' + b"[" * 10**5 + b"}", id="nested too deeply"),
    ],
)
def test_line_that_json_or_the_tokenizer_chokes_on(
    tmp_path: Path, tokenizer: ByteTokenizer, line: bytes
) -> None:
    path = write(tmp_path, line)
    with pytest.raises(ValueError, match=f"^{path}:1: "):
        FileSamples(path, tokenizer, LENGTH)


def test_beginning_token_is_not_repeated_between_prompt_and_response(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.hf.add_special_tokens({"bos_token": "<|begin|>"})
    begin = tokenizer.hf.bos_token_id
    tokenizer.hf.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    assert tokenizer.tokenize("a") == [begin, ord("a")]
    sample = one(tmp_path, tokenizer, {"prompt": "ab", "response": "cd"})
    assert context(sample, tokenizer) == "<|begin|>ab"
    assert trained(sample, tokenizer) == "cd" + END
