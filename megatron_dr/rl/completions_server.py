"""Rollouts from an OpenAI-compatible completions endpoint, such as vLLM's or SGLang's.

The contract. One POST to URL/completions for each prompt, with JSON

    {"model", "prompt": [ids], "max_tokens", "temperature", "top_p", "stop", "seed", "n": 1,
     "logprobs": 1, "return_token_ids": true, "return_tokens_as_token_ids": true}

with "top_k" and "min_tokens" where they are asked for, and an answer 200 with JSON, of which these
fields are read:

    {"choices": [{"finish_reason": "stop" | "length",
                  "token_ids": [ids],
                  "logprobs": {"token_logprobs": [numbers], "tokens": ["token_id:ID", ...]}}]}

Without `token_ids` the ids are read from `tokens`; servers that send neither can't be used, since
text does not tell the tokens. The log-probabilities must be those of what is sampled: after
temperature, top-k and top-p (vLLM: `--logprobs-mode processed_logprobs`), or sample without these.
Statuses 408, 429 and 5xx and broken connections are tried again, with a pause that doubles up to a
minute; another status ends the call with the server's message. The server's weights are its own
affair: load the policy's weights into it before each rollout.

Requests go to the server of the URL alone: no redirect is followed and no proxy is used. Time and
size of an answer are bounded, and ids, log-probabilities and the reason of its end are checked.
"""

import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_dr.rl.http_post import Address, Failure, Reply, post, shown
from megatron_dr.rl.rollouts import Completion, SamplingParams, sample_seed

_TOKEN = "token_id:"
_TEXT = 500  # bytes of a server's message, in an error
_LONGEST_PAUSE = 60.0
_REPLY, _REPLY_OF_TOKEN = 1 << 20, 1 << 12  # bytes that an answer may have; vLLM's has 200 a token


class CompletionsServer:
    """`Rollouts` by a server.

    Args:
        url: up to the version, such as http://localhost:8000/v1. Of another machine it must be
            https, unless `plain_http` is True.
        model: the name under which the server knows it.
        timeout: seconds that a request may take in all, before it counts as failed.
        retries: how often a failed request is tried again.
        concurrency: requests under way at once.
        key: sent as a bearer token, where the server asks for one.
        pause: seconds before the first further try.
        plain_http: send prompts and key in the open to another machine, and trust what comes back.

    Raises:
        ValueError: the URL or the key can't be used, or a number is out of range.
    """

    def __init__(
        self, url: str, model: str, timeout: float = 300.0, retries: int = 3, concurrency: int = 32,
        key: str | None = None, pause: float = 1.0, plain_http: bool = False,
    ) -> None:  # fmt: skip
        self._address = Address.of(url, "/completions", plain_http)
        if not 0 < timeout < math.inf or retries < 0 or concurrency < 1 or not pause >= 0:
            raise ValueError(
                f"a completions server needs a finite timeout ({timeout}) and a concurrency "
                f"({concurrency}) above 0, and retries ({retries}) and a pause ({pause}) from 0."
            )
        self._url, self._model = f"{self._address}", model
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._concurrency = concurrency
        self._headers = {"Content-Type": "application/json"}
        if key:
            if not (key.isascii() and key.isprintable()):
                raise ValueError("the server's key must be printable ASCII, on one line.")
            self._headers["Authorization"] = f"Bearer {key}"

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[Completion]:
        """See `Rollouts`; the first prompt that fails ends the call.

        Raises:
            ValueError: a prompt is empty, or the server refuses it.
            RuntimeError: the server can't be reached, fails, or answers against the contract.
        """
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {number} is empty; completions need at least one token.")
        most = _REPLY + _REPLY_OF_TOKEN * params.max_tokens
        threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="rollout")
        try:
            jobs = [
                threads.submit(self._one, number, self._body(prompt, params, seed, number), most)
                for number, prompt in enumerate(prompts)
            ]
            return [job.result() for job in jobs]
        finally:
            threads.shutdown(cancel_futures=True)

    def _body(self, prompt: Sequence[int], params: SamplingParams, seed: int, number: int) -> bytes:
        body = {
            "model": self._model, "prompt": list(prompt), "max_tokens": params.max_tokens,
            "temperature": params.temperature, "top_p": params.top_p, "stop": list(params.stop),
            "seed": sample_seed(seed, number), "n": 1, "logprobs": 1,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        further = {"top_k": params.top_k, "min_tokens": params.min_tokens}  # not OpenAI's own
        body |= {name: value for name, value in further.items() if value}
        return json.dumps(body).encode()

    def _one(self, number: int, body: bytes, most: int) -> Completion:
        answer = self._post(number, body, most)
        try:
            return _completion(json.loads(answer))
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise RuntimeError(
                f"{self._url} answered prompt {number} against the contract "
                f"({type(error).__name__}: {error}): {_text(answer)}"
            ) from error

    def _post(self, number: int, body: bytes, most: int) -> bytes:
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(self._pause * 2.0 ** min(attempt - 1, 60), _LONGEST_PAUSE))
            try:
                reply = post(self._address, body, self._headers, self._timeout, most)
            except Failure as error:
                failure = str(error)
                continue
            if reply.status == 200:
                return reply.body
            failure = _refusal(reply)
            if reply.status not in (408, 429) and reply.status < 500:
                raise ValueError(f"{self._url} refused prompt {number} with {failure}")
        raise RuntimeError(
            f"{self._url} failed on prompt {number} in {self._retries + 1} tries, at last with: "
            f"{failure}. Is the server up, and is the timeout of {self._timeout:g} s enough?"
        )


def _refusal(reply: Reply) -> str:
    if reply.location is None:
        return f"status {reply.status}: {_text(reply.body)}"
    return (
        f"status {reply.status}: it redirects to {reply.location!r:.200}, which is not followed: "
        "give the URL of the server itself"
    )


def _text(answer: bytes) -> str:
    return shown(answer[:_TEXT].decode(errors="replace"))


def _completion(answer: Any) -> Completion:
    choice = answer["choices"][0]
    logs = choice["logprobs"]
    ids = choice.get("token_ids")
    if ids is None:
        if not all(token.startswith(_TOKEN) for token in logs["tokens"]):
            raise ValueError("neither token_ids nor tokens of the form token_id:ID")
        ids = [_number(token.removeprefix(_TOKEN)) for token in logs["tokens"]]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {reason!r:.100} is neither stop nor length")
    return Completion(tuple(ids), tuple(logs["token_logprobs"]), reason)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"token_id:{text:.100} has no id")
    return int(text)
