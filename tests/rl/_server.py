"""An HTTP server on loopback that answers as vLLM's does."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Keeps what it was asked; `answer(body, number of the request)` gives status and body."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = vllm
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, answer = self.server.answer(body, len(self.server.requests))
        if status == 0:  # break the connection
            self.close_connection = True
            return
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def vllm(body: dict[str, Any], number: int) -> tuple[int, Any]:
    """Continues with the last token's two successors and the end token; after 1 with nothing."""
    first = body["prompt"][-1]
    ids = [first + 1, first + 2, 0][: body["max_tokens"]]
    if body["prompt"] == [1]:
        ids = []
    logs = {
        "text_offset": list(range(len(ids))),
        "tokens": [f"token_id:{i}" for i in ids],
        "token_logprobs": [-0.5 * (n + 1) for n in range(len(ids))],
        "top_logprobs": [{f"token_id:{i}": -0.5} for i in ids],
    }
    choice = {
        "index": 0, "text": "..", "logprobs": logs, "finish_reason": "stop", "stop_reason": None,
        "token_ids": ids, "prompt_token_ids": body["prompt"],
    }  # fmt: skip
    return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {}}
