"""The completions client against an HTTP server on loopback that answers as vLLM's does."""

import threading
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


def test_a_server_that_hangs_is_given_up(server: Server) -> None:
    def hang(body: dict[str, Any], number: int) -> tuple[int, Any]:
        server.released.wait(30)
        return 0, None

    server.answer = hang
    with pytest.raises(RuntimeError, match="in 1 tries.*timed out"):
        client(server, timeout=0.3, retries=0).generate([[4]], PARAMS, 0)


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
    with pytest.raises(ValueError, match="must begin with http"):
        CompletionsServer("localhost:8000", "policy")
    with pytest.raises(ValueError, match="retries"):
        CompletionsServer(server.url, "policy", retries=-1)
    for bad in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SamplingParams(**{"max_tokens": 1} | bad)
