"""What a run's first line says of it, and what it never says."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_dr.report import about, hidden
from megatron_dr.report.hidden import HIDDEN

SECRETS = [
    "--wandb-api-key 12f3", "--api_key=12f3", "--hf-token 12f3", "--apitoken 12f3",
    "--client-secret 12f3", "--db-password 12f3", "--authorization 12f3", "--aws-credentials 12f3",
    "--bad-words-tokens 12f3", "--url https://me:12f3@host/v1", "--url=https://host/v1?key=12f3",
    "--url https://12f3@host", "--url https://host/#access=12f3", '--kwargs {"api_key":"12f3"}',
    "--kwargs token=12f3,other=1", "--header Authorization:Bearer-12f3", "--a hf_12f3aaaaaaaaaa",
    "--a sk-aaaaaaaa12f3", "https://me:12f3@host", "--pwd 12f3", "--auth-token -12f3",
    "https://me:p@12f3@host/v1", "--a nvapi-aaaaaaaa12f3", "--a AIzaaaaaaaaa12f3",
    "--a eyJhbGciOi.eyJzdWIiOi.12f3",
]  # fmt: skip
KEPT = [
    "--tokenizer-type HuggingFaceTokenizer", "--dr-generate-tokens 128", "--lr -1e-3",
    "--calculate-per-token-loss", "--moe-token-dispatcher-type alltoall",
    "--tokenizer-model /a/b", "--dr-target-data a@b.jsonl",
    "--save s3://bucket/run", "--train-data-path 0.75 a.jsonl 0.25 b.jsonl", "-x 1",
]  # fmt: skip


@pytest.mark.parametrize("given", SECRETS)
def test_no_secret_is_said(given: str) -> None:
    said = about.flags([*given.split(), "--lr", "1"])
    assert "12f3" not in str(said) and said[-1] == ["--lr", "1"]


@pytest.mark.parametrize("given", KEPT)
def test_what_is_no_secret_is_said_as_it_is(given: str) -> None:
    name, _, values = given.partition(" ")
    assert about.flags(given.split()) == [[name, values]]


@pytest.mark.parametrize("said", [
    "Authorization: Bearer 12f3", "authorization=Basic 12f3", 'password: "a b, 12f3"',
    "api_key='x y 12f3'", "x-api-key: 12f3", "a" * 490 + " sk-aaaaaaaaaa12f3" + "b" * 99,
])  # fmt: skip
def test_no_secret_is_in_what_others_wrote(said: str) -> None:
    found = hidden.shown(said)
    assert "12f3" not in found and "sk-a" not in found and len(found) <= 500
    assert about.flags(["--header", said])[0][1].count("12f3") == 0


def test_an_error_of_others_code_is_shown() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    told = hidden.error(ValueError("\x1b[2J sk-abcdefghijk"), bare=hidden.SENTENCES)
    assert told == f"\\x1b[2J {HIDDEN}"
    assert hidden.error(KeyError("a")) == "KeyError: 'a'" and hidden.error(Mute()) == "Mute"


def test_a_url_keeps_where_it_leads() -> None:
    assert hidden.without_secrets("https://me:x@host:8000/v1?key=y") == "https://host:8000/v1"
    assert about.flags(["--hf-token", "x"]) == [["--hf-token", HIDDEN]]


@pytest.mark.parametrize("line, holds", [
    ("export HF_TOKEN=hf_aaaaaaaaaaaa", True), ("export WANDB_API_KEY='12f3'", True),
    ("curl -H 'Authorization: Bearer 12f3' https://host", True), ("login sk-aaaaaaaa12f3", True),
    ('export HF_TOKEN=$(cat ~/.token)', False), ('export WANDB_API_KEY="$KEY"', False),
    ("source keys.sh", False), ("export TOKENIZERS_PARALLELISM=false", False),
])  # fmt: skip
def test_a_line_holds_a_key(line: str, holds: bool) -> None:
    assert hidden.holds_key(line) == holds


def test_what_others_wrote_moves_no_terminal() -> None:
    said = hidden.shown("a\x1b[2J\nINFO all is well\u202e" + "x" * 999)
    assert said.startswith("a\\x1b[2J\\nINFO all is well\\u202exx") and said.isprintable()
    assert len(said) < 520


def test_git_says_commit_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert about.git(tmp_path) is None
    name = "-c user.name=a -c user.email=a@b -c commit.gpgsign=false commit -q -m a".split()
    (tmp_path / "a").write_text("1")
    for words in (["init", "-q"], ["add", "a"], name):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    found = about.git(tmp_path)
    assert found is not None and len(found["commit"]) == 40 and found["changed"] is False
    (tmp_path / "a").write_text("2")
    assert about.git(tmp_path / "none") == {**found, "changed": True}  # of the folder of the start
    monkeypatch.setenv("PATH", "")
    assert about.git(tmp_path) is None


def test_it_says_what_it_runs_on() -> None:
    found = about.of(["train.py", "--lr", "1"], {"steps": 3})
    assert found["flags"] == [["--lr", "1"]] and found["steps"] == 3
    assert {"python", "torch", "megatron_dr", "megatron-core"} <= found["versions"].keys()
    assert found["machine"]["memory bytes"] > 1e8 and found["process"]["pid"] == os.getpid()
    assert about.created(os.getpid()) == found["process"]["created"]
    assert about.created(2**22 + 1) is None
