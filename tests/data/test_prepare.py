"""What the command writes: the samples as training takes them, in every form and from every kind
of file; and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.tokenizers import MegatronTokenizer

from megatron_dr.cli.prepare import main
from megatron_dr.data.chat_template import template_text
from megatron_dr.data.file_samples import FileSamples
from megatron_dr.mcore.data.samples import chat_of

from . import _chat
from ._prepare import BYTES, command, documents, prepare, sources, write
from ._tokenizer import ByteTokenizer

TEXTS: list[Any] = [
    {"text": "A plain sentence."},
    {"prompt": "2+2=", "response": "4"},
    {"text": "Zürich → 東京 🙂"},
    {"prompt": "A long prompt. ", "response": "An answer that is longer than all others here."},
]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there."}]


def refused(*given: Any, **named: Any) -> str:
    """The sentence with which the command ends."""
    with pytest.raises(SystemExit) as stop:
        main(command(*given, **named))
    assert isinstance(stop.value.code, str)
    return stop.value.code


def read_directly(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(token ids, mask) of every sample of a file that is not prepared."""
    samples = FileSamples(str(path), tokenizer, 1000, chat_of(tokenizer))
    parts = [samples.part(n) for n in range(len(samples))]
    return [(part.ids.tolist(), part.mask.tolist()) for part in parts]


@pytest.mark.parametrize("length", [1000, 40])
def test_as_files_are_read_in_training(tmp_path: Path, length: int) -> None:
    """Same tokens, same labels with a loss, same cut as the files read directly."""
    data = write(tmp_path / "a.jsonl", TEXTS)
    manifest = prepare(data, tmp_path / "p", "--max-length", length + 1)
    direct = FileSamples(str(data), ByteTokenizer(), length)
    found = documents(tmp_path / "p")
    assert len(found) == len(direct)
    for (ids, mask), sample in zip(found, (direct[n] for n in range(len(direct))), strict=True):
        assert ids == [*sample["tokens"][:1].tolist(), *sample["labels"][: len(ids) - 1].tolist()]
        assert mask == [0, *sample["loss_mask"][: len(ids) - 1].int().tolist()]
        assert sample["loss_mask"].sum() == sum(mask)
    assert manifest["counts"].get("cut", 0) == direct.num_cut == (length < 50)
    statistics = manifest["statistics"]["tokens"]
    assert statistics["tokens"] == sum(len(ids) for ids, _ in found)
    assert statistics["largest_id"] == max(max(ids) for ids, _ in found)
    assert statistics["tokens_with_loss"] == sum(sum(mask) for _, mask in found)


def test_kinds_of_files(tmp_path: Path) -> None:
    """Parquet and a dataset on disk give what JSONL gives; the source is the row."""
    rows = [{"text": f"Text number {n}."} for n in range(23)]
    table = pyarrow.Table.from_pylist([row | {"prompt": None} for row in rows])
    write(tmp_path / "a.jsonl", rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    saved = tmp_path / "saved"
    saved.mkdir()
    for part in range(2):
        with pyarrow.ipc.new_stream(saved / f"{part}.arrow", table.schema) as stream:
            stream.write_table(table.slice(12 * part, 12))
    state = {"_data_files": [{"filename": f"{part}.arrow"} for part in range(2)]}
    (saved / "state.json").write_text(json.dumps(state))
    found = []
    for kind in ("a.jsonl", "a.parquet", "saved"):
        prepare(tmp_path / kind, tmp_path / "p", "--shard-size", 4, "--restart")
        found.append(documents(tmp_path / "p"))
        assert read_directly(tmp_path / kind, ByteTokenizer()) == found[-1]
        expected = [[n // 12, n % 12 + 1] if kind == "saved" else [0, n + 1] for n in range(23)]
        assert sources(tmp_path / "p") == expected
    assert found[0] == found[1] == found[2] and len(found[0]) == 23


def test_a_folder_in_order_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name in "ba":
        write(tmp_path / "in" / f"{name}.jsonl", [{"body": name}, "", {"body": name + name}])
    (tmp_path / "in" / "more").mkdir()
    (tmp_path / "in" / "more" / "notes.md").touch()
    manifest = prepare(tmp_path / "in", tmp_path / "p", "--columns", "text=body")
    assert f"note: {tmp_path / 'in'}: passed over more/notes.md" in capsys.readouterr().out
    assert [Path(f["path"]).name for f in manifest["files"]] == ["a.jsonl", "b.jsonl"]
    assert sources(tmp_path / "p") == [[0, 1], [0, 3], [1, 1], [1, 3]]
    assert [len(ids) for ids, _ in documents(tmp_path / "p")] == [2, 3, 2, 3]


def test_conversations(tmp_path: Path) -> None:
    folder = _chat.saved(tmp_path / "tokenizer")
    prepare(write(tmp_path / "a.jsonl", [{"messages": TURNS}]), tmp_path / "p", tokenizer=folder)
    [(ids, mask)] = documents(tmp_path / "p")
    tokenizer = MegatronTokenizer.from_pretrained(folder, metadata_path={"library": "huggingface"})
    assert read_directly(tmp_path / "a.jsonl", tokenizer) == [(ids, mask)]
    decode = _chat.fast(None).decode
    assert decode([i for i, m in zip(ids, mask, strict=True) if m]) == "Hello there.<|im_end|>"
    assert decode(ids).startswith("<|im_start|>user\nHi<|im_end|>")


def test_thoughts(tmp_path: Path) -> None:
    """Of a template of the package; training that reads the file itself has the same."""
    folder = _chat.saved(tmp_path / "tokenizer")
    data = write(
        tmp_path / "a.jsonl", [{"messages": [TURNS[0], TURNS[1] | {"reasoning_content": "Hm."}]}]
    )
    template = ("--chat-template", "qwen3", "--restart", "--thoughts")
    decode, found, digests = _chat.fast(None).decode, {}, set()
    for thoughts in ("all", "none"):
        manifest = prepare(data, tmp_path / "p", *template, thoughts, tokenizer=folder)
        [(ids, mask)] = documents(tmp_path / "p")
        found[thoughts] = decode([i for i, m in zip(ids, mask, strict=True) if m])
        tokenizer = MegatronTokenizer.from_pretrained(
            folder, metadata_path={"library": "huggingface"},
            chat_template=template_text("qwen3", thoughts),
        )  # fmt: skip
        assert read_directly(data, tokenizer) == [(ids, mask)]
        digests.add(manifest["tokenizer"]["sha256"])
    assert found["all"] == "<think>\nHm.\n</think>\n\nHello there.<|im_end|>"
    assert found["none"] == "Hello there.<|im_end|>" and len(digests) == 2
    assert "give --chat-template qwen3" in refused(
        data, tmp_path / "q", "--thoughts", "all", tokenizer=folder
    )


def test_several_templates(tmp_path: Path) -> None:
    """Text needs none; messages take the default."""
    tokenizer = _chat.fast(None)
    tokenizer.chat_template = {"default": _chat.CHATML, "tool_use": _chat.CHATML}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    lines = [{"text": "Hello there"}, {"messages": TURNS}]
    data, folder = write(tmp_path / "a.jsonl", lines), str(tmp_path / "tokenizer")
    first = prepare(data, tmp_path / "p", tokenizer=folder)
    assert len(documents(tmp_path / "p")) == 2
    more = tmp_path / "tokenizer" / "additional_chat_templates" / "tool_use.jinja"
    more.write_text(_chat.MARKED)
    second = prepare(data, tmp_path / "q", tokenizer=folder)
    assert first["tokenizer"] != second["tokenizer"]


def test_preference_pairs(tmp_path: Path) -> None:
    """Strings and conversations; only what differs has a loss."""
    folder = _chat.saved(tmp_path / "tokenizer")
    bad = [*TURNS[:1], {"role": "assistant", "content": "No."}]
    more = {"role": "user", "content": "And?"}
    lines = [
        {"prompt": "2+2=", "chosen": "4", "rejected": "five"},
        {"chosen": TURNS, "rejected": bad},
        {"prompt": [*TURNS, more], "chosen": TURNS[1:], "rejected": bad[1:]},
    ]
    prepare(write(tmp_path / "a.jsonl", lines), tmp_path / "p", tokenizer=folder)
    decode = _chat.fast(None).decode
    trained = [
        [
            decode([i for i, m in zip(*both, strict=True) if m])
            for both in documents(tmp_path / "p", part)
        ]
        for part in ("_chosen", "_rejected")
    ]
    end = "<|im_end|>"
    assert trained[0] == ["4" + end, "Hello there." + end, "Hello there." + end]
    assert trained[1] == ["five" + end, "No." + end, "No." + end]
    assert sources(tmp_path / "p") == [[0, 1], [0, 2], [0, 3]]


def test_prompts_with_answers(tmp_path: Path) -> None:
    """The prompt alone, ready for an answer; answers follow their samples through the split."""
    folder = _chat.saved(tmp_path / "tokenizer")
    lines: list[Any] = [{"prompt": f"{n}+1=", "answer": n + 1, "id": f"q{n}"} for n in range(9)]
    lines.append({"prompt": TURNS[:1], "answer": {"words": ["Hello"]}, "level": 3})
    data = write(tmp_path / "a.jsonl", lines)
    prepare(data, tmp_path / "p", "--validation", 3, "--shard-size", 4, tokenizer=folder)
    decode, seen = _chat.fast(None).decode, 0
    for prefix in (tmp_path / "p", tmp_path / "p_validation"):
        answers = [json.loads(line) for line in Path(f"{prefix}_answers.jsonl").open()]
        assert [a["id"] for a in answers] == list(range(len(documents(prefix))))
        for (ids, mask), answer, (_, line) in zip(
            documents(prefix), answers, sources(prefix), strict=True
        ):
            record, seen = lines[line - 1], seen + 1
            assert not any(mask) and answer["answer"] == record["answer"]
            assert answer.get("level") == record.get("level")
            if line < 10:
                assert decode(ids) == record["prompt"] and answer["source_id"] == record["id"]
            else:
                assert decode(ids).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")
    assert seen == 10


def test_sentencepiece_and_bytes_round_trip(tmp_path: Path) -> None:
    """Decoded, the ids are the text; the last is the end of text."""
    model = _chat.sentencepiece_model(tmp_path)
    texts = ["Hello there, how are you?", "東京 🙂"]
    data = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    kinds = [(model, {"library": "sentencepiece"}), ("byte-level", {"library": "byte-level"})]
    for name, library in kinds:
        path = {} if name == "byte-level" else {"tokenizer_path": name}
        tokenizer = MegatronTokenizer.from_pretrained(metadata_path=library, **path)
        prepare(data, tmp_path / "p", "--restart", tokenizer=name)
        for (ids, mask), text in zip(documents(tmp_path / "p"), texts, strict=True):
            assert ids[-1] == tokenizer.eod and tokenizer.detokenize(ids[:-1]) == text
            assert mask == [0] + [1] * (len(ids) - 1)


def test_samples_that_are_too_long(tmp_path: Path) -> None:
    lines = [{"text": "short"}, {"prompt": "x" * 30, "response": "y"}, {"text": "z" * 30}]
    data = write(tmp_path / "a.jsonl", lines)
    flags = ("--restart", "--max-length", 20)
    manifest = prepare(data, tmp_path / "p", *flags)
    assert manifest["counts"] == {
        "records": 3, "cut": 1, "dropped: the prompt alone is too long": 1,
    }  # fmt: skip
    assert [len(ids) for ids, _ in documents(tmp_path / "p")] == [6, 20]
    manifest = prepare(data, tmp_path / "p", *flags, "--too-long", "drop")
    assert manifest["counts"] == {"records": 3, "dropped: too long": 2}
    sentence = refused(data, tmp_path / "p", *flags, "--too-long", "refuse")
    assert f"{data}:2: 32 tokens, more than --max-length 20" in sentence
    assert not (tmp_path / "p.bin").exists()


BAD = [
    ("{", "not JSON"),
    ('{"text": 3}', "must be a string, and is int"),
    ('{"text": " "}', "is empty"),
    ('{"text": "\\ud800"}', "surrogate"),
    ('{"txt": "x"}', "this one has 'txt'"),
    ('{"prompt": "x", "response": "y", "text": "z"}', "must have one of"),
    ("[1]", "must be a JSON object"),
    (json.dumps({"messages": TURNS}), "--chat-template"),
]


@pytest.mark.parametrize("line, sentence", BAD)
def test_a_wrong_line(tmp_path: Path, line: str, sentence: str) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "fine"}, line, {"text": "fine too"}])
    message = refused(data, tmp_path / "p")
    assert f"{data}:2: " in message and sentence in message
    assert not list(tmp_path.glob("p[._]*.bin"))
    manifest = prepare(data, tmp_path / "p", "--bad-lines", "skip", "--restart")
    assert manifest["counts"] == {"records": 3, "bad": 1}
    assert len(manifest["bad_lines"]) == 1 and sentence in manifest["bad_lines"][0]
    assert sources(tmp_path / "p") == [[0, 1], [0, 3]]


def test_what_else_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", TEXTS)
    empty = write(tmp_path / "empty.jsonl", [])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    out = tmp_path / "p"
    for given, sentence in [
        ((tmp_path / "none.jsonl", out), "none.jsonl: no such file or folder"),
        ((empty, out), "no sample is left of 0 records"),
        ((tmp_path / "broken.parquet", out), "not a Parquet file"),
        ((tmp_path / "folder", out), "no .jsonl or .parquet file"),
        ((tmp_path / "splits", out), "splits/train, "),
        (([data, data], out), "given twice"),
        ((data, out, "--columns", "texts=body"), "NAME one of text"),
        ((data, out, "--validation", 4, "--restart"), "leaves no sample for training"),
    ]:
        assert sentence in refused(*given)
    assert "neither a folder" in refused(data, out, tokenizer=str(tmp_path / "folder"))
    assert not list(tmp_path.glob("p[._]*.bin"))
    (tmp_path / "q.bin").write_bytes(b"of another")
    assert "no finished output of this tool" in refused(data, tmp_path / "q")
    assert (tmp_path / "q.bin").read_bytes() == b"of another"


def test_bytes_are_the_examples_tokenizer() -> None:
    """The direct reader's tokenizer in these tests is Megatron's of the same folder."""
    stock = MegatronTokenizer.from_pretrained(BYTES, metadata_path={"library": "huggingface"})
    assert stock.tokenize("Zürich") == ByteTokenizer().tokenize("Zürich")
    assert stock.eod == ByteTokenizer().eod
