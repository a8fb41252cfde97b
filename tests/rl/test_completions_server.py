"""The completions client against an HTTP server on loopback that answers as vLLM's does."""

import contextlib
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from megatron_dr.rl.completions_server import CompletionsServer
from megatron_dr.rl.rollouts import Completion, Rollouts, SamplingParams, sample_seed

from ._server import Answer, Server, vllm

PARAMS = SamplingParams(max_tokens=3, temperature=0.7, top_p=0.9, stop=("\n",))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def client(server: Server, **arguments: Any) -> CompletionsServer:
    return CompletionsServer(server.url, "policy", **{"pause": 0.01, "timeout": 10.0} | arguments)


def test_completions_come_in_the_prompts_order(server: Server) -> None:
    rollouts: Rollouts = client(server)
    got = rollouts.generate([[7, n] for n in range(10, 50)], PARAMS, seed=5)
    assert got == [Completion((n + 1, n + 2, 0), (-0.5, -1.0, -1.5), "stop") for n in range(10, 50)]


def test_the_request_is_the_contract(server: Server) -> None:
    client(server, concurrency=1, key="secret").generate([[3, 4], [3, 4]], PARAMS, seed=5)
    path, headers, body = server.requests[0]
    assert path == "/v1/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {
        "model": "policy", "prompt": [3, 4], "max_tokens": 3, "temperature": 0.7, "top_p": 0.9,
        "stop": ["\n"], "seed": sample_seed(5, 0), "n": 1, "logprobs": 1,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    assert server.requests[1][2]["seed"] == sample_seed(5, 1) != sample_seed(5, 0)
    further = SamplingParams(max_tokens=3, top_k=7, min_tokens=2)
    client(server).generate([[3]], further, seed=5)
    assert (server.requests[2][2]["top_k"], server.requests[2][2]["min_tokens"]) == (7, 2)


def test_ids_may_come_as_tokens_alone(server: Server) -> None:
    def older(body: dict[str, Any], number: int) -> tuple[int, Any]:
        status, answer = vllm(body, number)
        del answer["choices"][0]["token_ids"]
        return status, answer

    server.answer = older
    assert client(server).generate([[4]], PARAMS, 0)[0].ids == (5, 6, 0)


def test_an_empty_completion_is_one(server: Server) -> None:
    assert client(server).generate([[1]], PARAMS, 0) == [Completion((), (), "stop")]


@pytest.mark.parametrize("status", [0, 429, 500, 503])
def test_failures_that_pass_are_tried_again(server: Server, status: int) -> None:
    server.answer = lambda body, number: (status, {}) if number < 3 else vllm(body, number)
    assert client(server).generate([[4]], PARAMS, 0)[0].ids == (5, 6, 0)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status, seen", [(0, "closed connection"), (503, "503: .*busy")])
def test_tries_are_bounded(server: Server, status: int, seen: str) -> None:
    server.answer = lambda body, number: (status, {"error": "busy"})
    with pytest.raises(RuntimeError, match=f"prompt 0 in 3 tries, at last with: .*{seen}"):
        client(server, retries=2).generate([[4]], PARAMS, 0)
    assert len(server.requests) == 3


def test_a_refusal_is_told_at_once(server: Server) -> None:
    server.answer = lambda body, number: (400, {"message": "maximum context length is 8"})
    with pytest.raises(ValueError, match="prompt 0 with status 400: .*context length is 8"):
        client(server).generate([[4] * 9], PARAMS, 0)
    assert len(server.requests) == 1


SECRET = "12f3-of-the-user"


@pytest.mark.parametrize("status", [200, 307, 401, 500])
def test_the_key_is_in_no_message(server: Server, status: int) -> None:
    """Some servers repeat what they refuse; nor do signs get through that a terminal would obey."""
    said = f"the key {SECRET} is not known\n\x1b[2Jall is well"
    server.headers = {"Location": f"http://me:{SECRET}@host/?key={SECRET}"} if status == 307 else {}
    server.answer = lambda body, number: (status, {"message": said, "choices": [{SECRET: said}]})
    engine = client(server, key=SECRET, retries=0)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        engine.generate([[4]], PARAMS, 0)
    text = "".join(traceback.format_exception(raised.value)) + repr(engine)
    assert SECRET not in text and "\x1b" not in text
    assert status == 307 or "(left out)" in text


@pytest.mark.parametrize("url", [
    f"https://host/v1?key={SECRET}", f"https://me:{SECRET}@host", f"ftp://me:{SECRET}@host/",
    f"https://host/#{SECRET}", f"me:{SECRET}@host", f"https:///?{SECRET}",
])  # fmt: skip
def test_a_url_that_is_refused_is_not_shown_with_its_secret(url: str) -> None:
    with pytest.raises(ValueError) as raised:
        CompletionsServer(url, "policy")
    assert SECRET not in "".join(traceback.format_exception(raised.value))


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    def hang(body: dict[str, Any], number: int) -> tuple[int, Any]:
        server.released.wait(30)
        return 0, None

    server.answer = hang
    with pytest.raises(RuntimeError, match="in 1 tries.*timed out"):
        client(server, timeout=0.3, retries=0).generate([[4]], PARAMS, 0)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_and_not_followed(server: Server, status: int) -> None:
    """No other server sees the key, and its answer is not believed."""
    with Server() as other:
        threading.Thread(target=other.serve_forever, args=(0.02,)).start()
        server.headers = {"Location": other.url.replace("127.0.0.1", "localhost")}
        server.answer = lambda body, number: (status, {})
        with pytest.raises(ValueError, match=f"{status}: it redirects to .*is not followed"):
            client(server, key="secret").generate([[4]], PARAMS, 0)
        other.shutdown()
    assert len(server.requests) == 1 and not other.requests


def test_no_proxy_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert client(server).generate([[4]], PARAMS, 0)[0].ids == (5, 6, 0)


RAW = {  # what a server sends a piece at a time; the last piece again and again
    "status": [b"HTTP/1.1 2"],
    "headers": [b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"],
    "continue": [b"HTTP/1.1 100 Continue\r\n\r\n"],
    "body": [b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "],
    "chunks": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"],
    "no length": [b"HTTP/1.1 200 OK\r\n\r\n", b" "],
}


@contextlib.contextmanager
def dripping(pieces: list[bytes], pause: float, seen: list[int]) -> Iterator[str]:
    """A server that answers so, until the connection breaks; `seen` has what it sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                taken, _ = listening.accept()
                with taken:
                    taken.recv(1 << 16)
                    for number in range(1 << 20):
                        seen.append(taken.send(pieces[min(number, len(pieces) - 1)]))
                        time.sleep(pause)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("pieces", RAW.values(), ids=RAW.keys())
def test_an_answer_in_drops_is_given_up_in_time(pieces: list[bytes]) -> None:
    with dripping(pieces, 0.02, []) as url:
        began = time.monotonic()
        rollouts = CompletionsServer(url, "policy", timeout=0.4, retries=0)
        with pytest.raises(RuntimeError, match="in 1 tries, at last with: timed out after 0.4 s"):
            rollouts.generate([[4]], PARAMS, 0)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["body", "chunks", "no length"])
def test_an_answer_without_end_is_given_up(kind: str) -> None:
    first, _ = RAW[kind]
    piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n" if kind == "chunks" else b" " * 0x8000
    seen: list[int] = []
    with dripping([first.replace(b"1000000", b"9000000000"), piece], 0.0, seen) as url:
        rollouts = CompletionsServer(url, "policy", timeout=60.0, retries=0)
        with pytest.raises(RuntimeError, match="its answer has more than 1060864 bytes"):
            rollouts.generate([[4]], PARAMS, 0)
    assert sum(seen) < 16 << 20  # what sockets hold


def test_a_timeout_may_be_long(server: Server) -> None:
    assert client(server, timeout=1e300).generate([[4]], PARAMS, 0)[0].ids == (5, 6, 0)


def test_no_server_is_told() -> None:
    with Server() as closed:
        url = closed.url
    with pytest.raises(RuntimeError, match="Connection refused.*Is the server up"):
        CompletionsServer(url, "policy", retries=0).generate([[4]], PARAMS, 0)


def broken(change: Callable[[dict[str, Any]], Any]) -> Answer:
    def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
        status, content = vllm(body, number)
        change(content["choices"][0])
        return status, content

    return answer


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda *_: (200, b"<html>"), "JSONDecodeError"),
        (lambda *_: (200, {"choices": []}), "IndexError"),
        (broken(lambda c: c.pop("logprobs")), "KeyError: 'logprobs'"),
        (broken(lambda c: c.update(finish_reason="abort")), "'abort' is neither stop nor length"),
        (broken(lambda c: c["logprobs"]["token_logprobs"].pop()), "3 tokens but 2 log-prob"),
        (broken(lambda c: (c.pop("token_ids"), c["logprobs"].update(tokens=["a", "b", "c"]))),
         "neither token_ids nor"),
        (broken(lambda c: (c.pop("token_ids"), c["logprobs"].update(tokens=["token_id:-1"] * 3))),
         "token_id:-1 has no id"),
        (broken(lambda c: (c.pop("token_ids"), c["logprobs"].update(tokens=[1, 2, 3]))), "Attr"),
        (lambda *_: (200, b"[" * 200_000), "RecursionError"),
        (lambda *_: (200, b"[]"), "TypeError"),
        (lambda *_: (200, b"9" * 9000), "ValueError"),
        *((broken(lambda c, bad=bad: c.update(token_ids=[5, bad, 0])), "ids are integers from 0")
          for bad in (6.5, 6.0, True, "6", None, -1, 2**31, [6])),
        (broken(lambda c: c.update(token_ids="560")), "ids are integers from 0, not '5'"),
        *((broken(lambda c, bad=bad: c["logprobs"].update(token_logprobs=[-1, bad, -1])),
           "finite and at most 0")
          for bad in (float("nan"), float("-inf"), float("inf"), 0.5, "-1", None, False,
                      -(10**400), -1e39)),
    ],
)  # fmt: skip
def test_answers_against_the_contract_are_refused(
    server: Server, answer: Answer, message: str
) -> None:
    server.answer = answer
    with pytest.raises(RuntimeError, match=f"against the contract.*{message}"):
        client(server).generate([[4]], PARAMS, 0)


def test_bad_arguments_are_refused(server: Server) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        client(server).generate([[4], []], PARAMS, 0)
    assert not server.requests
    for url, why in (
        ("localhost:8000", "must begin with http"), ("http://", "needs a host"),
        ("http://localhost:x/v1", "needs a host"), ("http://localhost/v1?a=b", "behind its path"),
        ("http://me:secret@localhost/v1", "has a user or a password in it"),
        ("http://10.0.0.7:8000/v1", "to 10.0.0.7 in the open: use https, or give plain_http=True"),
        ("http://node7/v1", "to node7 in the open"), ("http://127.0.0.1.nip.io", "in the open"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why) as told:
            CompletionsServer(url, "policy", key="hidden")
        assert "secret" not in str(told.value) and "hidden" not in str(told.value)
    for url in ("https://node7/v1", "http://[::1]:8000", "http://localhost", "http://127.8.0.1/v1"):
        CompletionsServer(url, "policy")
    CompletionsServer("http://node7:8000/v1", "policy", plain_http=True)
    with pytest.raises(ValueError, match="printable ASCII"):
        CompletionsServer(server.url, "policy", key="a\nHost: other")
    with pytest.raises(ValueError, match="finite timeout"):
        CompletionsServer(server.url, "policy", timeout=float("inf"))
    with pytest.raises(ValueError, match="retries"):
        CompletionsServer(server.url, "policy", retries=-1)
    for bad in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1},
                {"min_tokens": 9}, {"min_tokens": 1, "stop": ("x",)}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingParams(**{"max_tokens": 1} | bad)
