"""Texts of samples are read where they are still what a run was given."""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_dr.data.identities import content
from megatron_dr.report import texts


def sample(file: str | None, line: int | None, hashed: str | None, own: str | None = None) -> Any:
    return {"file": file, "line": line, "hash": hashed, "id": own}


def test_a_text_is_that_of_the_run_or_none(tmp_path: Path) -> None:
    records = [{"text": "uno"}, {"messages": [{"role": "user", "content": "dos"}]}, {"chosen": "3"}]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    hashes = [content(record) for record in records]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    found = texts.texts(
        [
            *(sample("a.jsonl", n + 1, hashed) for n, hashed in enumerate(hashes)),
            sample(None, None, hashes[0], f"{file}:1"),  # of a slot
            sample(str(file), 1, "tokens:0"), sample("a.jsonl", 1, "tokens:0"),
            sample("a.jsonl", 1, hashes[1]), sample("a.jsonl", 9, hashes[1]),
            sample("none.jsonl", 1, hashes[0]), sample(None, None, hashes[0], "7"),
            sample(None, None, None),
        ],
        {str(file): sha256}, str(tmp_path),
    )  # fmt: skip
    assert found[:5] == [("uno", True), ("user: dos", True), ('{\n "chosen": "3"\n}', True),
                         ("uno", True), ("uno", True)]  # fmt: skip
    assert not any(is_text for _, is_text in found[5:])
    said = ["another text", "another text", "no such line", "is not there", "does not say where",
            "does not say where"]  # fmt: skip
    assert all(part in text for part, (text, _) in zip(said, found[5:], strict=True))
    file.write_bytes(b"\xff\n")
    ((why, is_text),) = texts.texts([sample(str(file), 1, hashes[0])], {})
    assert "can't be read" in why and not is_text
