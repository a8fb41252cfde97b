"""Rollouts from an OpenAI-compatible completions endpoint, such as vLLM's or SGLang's.

The contract. One POST to URL/completions for each prompt, with JSON

    {"model", "prompt": [ids], "max_tokens", "temperature", "top_p", "stop", "seed", "n": 1,
     "logprobs": 1, "return_token_ids": true, "return_tokens_as_token_ids": true}

and an answer 200 with JSON, of which these fields are read:

    {"choices": [{"finish_reason": "stop" | "length",
                  "token_ids": [ids],
                  "logprobs": {"token_logprobs": [numbers], "tokens": ["token_id:ID", ...]}}]}

Without `token_ids` the ids are read from `tokens`; servers that send neither can't be used, since
text does not tell the tokens. The log-probabilities must be those of what is sampled: after
temperature and top-p (vLLM: `--logprobs-mode processed_logprobs`), or use temperature and top_p 1.
Statuses 408, 429 and 5xx and broken connections are tried again, with a pause that doubles;
another status ends the call with the server's message. The server's weights are its own affair:
load the policy's weights into it before each rollout.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_dr.rl.rollouts import Completion, SamplingParams, sample_seed

_TOKEN = "token_id:"
_TEXT = 500  # of a server's message, in an error


class CompletionsServer:
    """`Rollouts` by a server.

    Args:
        url: up to the version, such as http://localhost:8000/v1.
        model: the name under which the server knows it.
        timeout: seconds without an answer before a request counts as failed.
        retries: how often a failed request is tried again.
        concurrency: requests under way at once.
        key: sent as a bearer token, where the server asks for one.
        pause: seconds before the first further try.

    Raises:
        ValueError: the URL is not one of http or https, or a number is out of range.
    """

    def __init__(
        self, url: str, model: str, timeout: float = 300.0, retries: int = 3, concurrency: int = 32,
        key: str | None = None, pause: float = 1.0,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"the server's URL must begin with http:// or https://, not {url!r}.")
        if not timeout > 0 or retries < 0 or concurrency < 1 or pause < 0:
            raise ValueError(
                f"a completions server needs a timeout ({timeout}) and a concurrency "
                f"({concurrency}) above 0, and retries ({retries}) and a pause ({pause}) from 0."
            )
        self._url, self._model = url.rstrip("/") + "/completions", model
        self._timeout, self._retries, self._pause = timeout, retries, pause
        self._concurrency = concurrency
        self._headers = {"Content-Type": "application/json"}
        if key:
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
        threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="rollout")
        try:
            jobs = [
                threads.submit(self._one, number, self._body(prompt, params, seed, number))
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
        return json.dumps(body).encode()

    def _one(self, number: int, body: bytes) -> Completion:
        answer = self._post(number, body)
        try:
            return _completion(json.loads(answer))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RuntimeError(
                f"{self._url} answered prompt {number} against the contract "
                f"({type(error).__name__}: {error}): {answer[:_TEXT].decode(errors='replace')}"
            ) from error

    def _post(self, number: int, body: bytes) -> bytes:
        failure = ""
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            request = urllib.request.Request(self._url, body, self._headers)
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    read: bytes = response.read()
                    return read
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {_message(error)}"
                if error.code not in (408, 429) and error.code < 500:
                    refusal = f"{self._url} refused prompt {number} with {failure}"
                    raise ValueError(refusal) from error
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts too
                failure = str(error) or type(error).__name__
        raise RuntimeError(
            f"{self._url} failed on prompt {number} in {self._retries + 1} tries, at last with: "
            f"{failure}. Is the server up, and is the timeout of {self._timeout:g} s enough?"
        )


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(_TEXT).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _completion(answer: Any) -> Completion:
    choice = answer["choices"][0]
    logs = choice["logprobs"]
    ids = choice.get("token_ids")
    if ids is None:
        if not all(token.startswith(_TOKEN) for token in logs["tokens"]):
            raise ValueError("neither token_ids nor tokens of the form token_id:ID")
        ids = [token.removeprefix(_TOKEN) for token in logs["tokens"]]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason {reason!r} is neither stop nor length")
    log_probs = tuple(float(value) for value in logs["token_logprobs"])
    return Completion(tuple(int(token) for token in ids), log_probs, reason)
