"""What flags and replies say: numbers, corpora's names, reward specs, a server's answers."""

import dataclasses
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from hypothesis import strategies as st

from megatron_dr.cli import prepare
from megatron_dr.compare import arms, budget
from megatron_dr.config import named
from megatron_dr.config.dpo import PreferenceConfig
from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import set_named
from megatron_dr.config.lora import LoRAConfig
from megatron_dr.config.meso import MesoConfig
from megatron_dr.config.rl import RLConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.data.domains import DomainPlan
from megatron_dr.rl import reward_process
from megatron_dr.rl.completions_server import CompletionsServer
from megatron_dr.rl.http_post import Address
from megatron_dr.rl.rollouts import SamplingParams

from ._cases import (
    NUMBERS,
    TEXTS,
    VALUES,
    Raw,
    bounded,
    command,
    damaged,
    dumped,
    fuzzed,
    refused,
    trees,
)

CONFIGS = (DRConfig, RLConfig, LoRAConfig, MesoConfig, PreferenceConfig, TargetConfig)
_FLOATS = NUMBERS.filter(lambda n: not isinstance(n, int)) | st.floats()
_WHOLE = NUMBERS.filter(lambda n: isinstance(n, int)) | st.integers()


def _of(kind: Any) -> st.SearchStrategy[Any]:
    """Values as the command line gives them to a field of this type."""
    text = str(kind)
    found: list[st.SearchStrategy[Any]] = []
    found += [_FLOATS] if "float" in text else []
    found += [st.booleans()] if "bool" in text else []
    found += [_WHOLE] if "int" in text else []
    found += [st.none()] if "None" in text else []
    named_ = ["cone", "auto", "a:b", "os:system", "json:loads", "x" * 300]
    found += [TEXTS | st.sampled_from(named_)] if "str" in text or "Literal" in text else []
    return st.one_of(found) if found else st.none()


@st.composite
def configs(draw: Any) -> Any:
    kind = draw(st.sampled_from(CONFIGS))
    hints = get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    return kind, {name: draw(_of(hints[name])) for name in chosen}


def configure(case: Any) -> None:
    kind, values = case
    refused(lambda: kind(**values))


test_config, test_config_long = fuzzed(
    configure,
    configs(),
    120,
    3000,
    [(RLConfig, {"reward": "megatron_dr.rl.rewards:exact_match", "reward_timeout": 3e6})],
)

_SPECS = TEXTS | st.sampled_from([
    "a", ":", "a:", ":b", "a:b:c", "os:system", "os:name", "json:loads", "os.path:join", "..:a",
    "tests.fuzz._raises:f", "tests.fuzz._ends:f", "a b:c", "é:é", "json:", "json:loads.x", "\0:\0",
    "\ud83d:a", "x" * 5000 + ":y", "__main__:nothing", "0:0", "json:0",
])  # fmt: skip


def load(case: str) -> None:
    """Named functions, and sets."""
    refused(lambda: named.load_function("reward", case))
    refused(lambda: set_named(case))


test_spec, test_spec_long = fuzzed(
    load, _SPECS, 60, 1000, ["tests.fuzz._raises:f", "tests.fuzz._ends:f"]
)


def weights(case: list[float]) -> None:
    refused(lambda: DomainPlan(case).domain(7))


test_weights, test_weights_long = fuzzed(
    weights, st.lists(_FLOATS, max_size=4), 40, 600, [[1e-320, 1e308], [5e-324], [1e308, 1e308]]
)


def words(case: str) -> None:
    """Texts of flags that have a form of their own."""
    for read in (arms.parse, budget.seconds,
                 lambda text: prepare.columns([text]),
                 lambda text: Address.of(text, "/completions", False)):  # fmt: skip
        found = " ".join(case.split())  # who writes a line end into a flag sees it again
        refused(lambda read=read, found=found: read(found))


_WORDS = TEXTS | st.sampled_from([
    "5h", "-1m", "1e999h", "nan s", "mix:0.5", "mix:", "cone:1e999", "text=", "=x", "text=a=b",
    "http://", "http://[::1", "http://a:99999999", "https://u:p@h", "http://localhost:0/%zz",
    "http://[fe80::1%25x]/", "http://\u2100.com", "https://" + "a" * 5000,
    "http://127.0.0.1:1\r\nX: y",
])  # fmt: skip
test_words, test_words_long = fuzzed(words, _WORDS, 60, 1000)

_ANSWER = {"choices": [{"finish_reason": "stop", "token_ids": [1, 2], "logprobs": {
    "token_logprobs": [-0.5, -0.1], "tokens": ["token_id:1", "token_id:2"]}}]}  # fmt: skip
_TOKENS = {"choices": [{k: v for k, v in _ANSWER["choices"][0].items() if k != "token_ids"}]}


class _Server(CompletionsServer):
    """With an answer that is there."""

    def __init__(self, answer: bytes) -> None:
        super().__init__("http://localhost:1/v1", "m")
        self.answer = answer

    def _post(self, number: int, body: bytes, most: int) -> bytes:
        return self.answer


def reply(case: Any) -> None:
    answer = case if isinstance(case, bytes) else dumped(case)
    refused(
        lambda: _Server(answer).generate([[1]], SamplingParams(4), 0), "http://localhost:1",
        errors=(RuntimeError,),
    )  # fmt: skip


def _with(**values: Any) -> dict[str, Any]:
    return {"choices": [_ANSWER["choices"][0] | values]}


FAILED_REPLIES: list[Any] = [
    _with(logprobs={"token_logprobs": [Raw("-1" + "0" * 400), 0.0]}), b"[" * 100_000, b"",
    _with(token_ids=[Raw("9" * 5000), 1]), b'\xff{"choices"', _with(token_ids=[True, 1]),
    {"choices": [_TOKENS["choices"][0] | {"logprobs": {
        "token_logprobs": [-1.0], "tokens": ["token_id:" + "9" * 5000]}}]},
]  # fmt: skip
_REPLIES = trees([_ANSWER, _TOKENS]) | damaged([dumped(_ANSWER), dumped(_TOKENS)])
test_reply, test_reply_long = fuzzed(reply, _REPLIES, 100, 3000, FAILED_REPLIES)

_HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (
    len(dumped(_ANSWER)),
    dumped(_ANSWER),
)
_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (
    len(dumped(_ANSWER)), dumped(_ANSWER)
)  # fmt: skip


@contextmanager
def answering(content: bytes) -> Iterator[int]:
    """A server that says this to whoever connects, and hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                one, _ = listening.accept()
            except OSError:
                return
            with one:
                one.settimeout(5)
                try:
                    one.recv(1 << 16)
                    one.sendall(content)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)


def http(case: bytes) -> None:
    with answering(case) as port:
        server = CompletionsServer(f"http://127.0.0.1:{port}/v1", "m", timeout=2.0, retries=0)
        refused(
            lambda: server.generate([[1]], SamplingParams(4), 0), f"127.0.0.1:{port}",
            errors=(RuntimeError,),
        )  # fmt: skip


FAILED_HTTP = [
    b"HTTTP/1.1 200 OK\r\n\r\n", b"\x1b[2J\n", b"HTTP/1.1 500 \x1b[2J\r\n\r\n\x1b]0;a\n",
    b"", b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"HTTP/1.1 999999999999 X\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"\0" * 70000,
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: \xff\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
]  # fmt: skip
test_http, test_http_long = fuzzed(http, damaged([_HTTP, _CHUNKED]), 40, 1000, FAILED_HTTP)


def worker(case: bytes) -> None:
    """A line on the pipe of a reward worker."""
    with bounded():
        found = reward_process._reply(case, "word")
    assert found is None or found["word"] == "word"


_LINE = dumped({"word": "word", "reward": 1.0})
test_worker, test_worker_long = fuzzed(
    worker, damaged([_LINE]) | VALUES.map(lambda v: json.dumps(v).encode()), 40, 1000,
    [b"[" * 100_000, b"\xff", b"1" * 5000],
)  # fmt: skip


_COMMANDS = {
    "convert": ["hf-to-mcore", "mcore-to-hf", "--tp", "--pp", "--ep", "--dtype", "--file-size",
                "--config", "--lora-alpha", "--base-model", "--adapter", "--backend"],
    "verify": ["--prompt", "--tp", "--tolerance"], "watch": ["--once"],
    "report": ["--compare", "--out"],
    "weights": ["--top", "--csv", "--blend", "--keep-above", "--keep-share", "--filter", "--png"],
    "launch": ["--recipes", "--slurm", "--dry-run", "--show-logs"],
    "nothing": [], "": [],
}  # fmt: skip
_WORD = TEXTS.filter(lambda text: "\0" not in text and not text.startswith("/dev/zero"))


@st.composite
def lines(draw: Any) -> list[str]:
    """A command line of the command's own flags and words that mean nothing to it."""
    name = draw(st.sampled_from([*_COMMANDS]))
    words = draw(st.lists(_WORD | st.sampled_from([*_COMMANDS[name], "a", "1"]), max_size=5))
    if draw(st.booleans()) and _COMMANDS[name]:
        words.append(f"{draw(st.sampled_from(_COMMANDS[name]))}={draw(_WORD)}")
    return [name, *words]


def command_line(case: list[str]) -> None:
    """In an empty folder: a sentence, and nothing is written."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as held:
        os.chdir(held)
        try:
            code, _ = command(case, Path(held))
            assert code or {"-h", "--help"} & set(case), case
        finally:
            os.chdir(before)


FAILED_LINES = [
    ["convert", "hf-to-mcore", "x" * 5000, "out"], ["convert", "mcore-to-hf", "\ud83d", "out"],
    ["report", "x" * 5000], ["watch", "x" * 5000], ["watch", "\ud83d", "--once"],
    ["weights", "x" * 5000],
    ["weights", "a", "--top=0"], ["weights", "a", "--filter", "a", "b", "--keep-above=nan"],
    ["launch", "a/b/c", "--recipes=/dev/null"], ["launch", "../a/b"], ["launch", "\ud83d/b"],
    ["convert", "mcore-to-hf", "a", "b", "--file-size=nan"],
    ["convert", "mcore-to-hf", "a", "b", "--file-size=inf"],
]  # fmt: skip
test_line, test_line_long = fuzzed(command_line, lines(), 40, 1500, FAILED_LINES)
