"""Engines of the tests, named by --dr-rl-engine: a server on loopback answers over HTTP."""

import threading
from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.rl.completions_server import CompletionsServer

from ..rl._server import Server

NOBODY = "http://127.0.0.1:9/v1"


class Engine(CompletionsServer):
    """Weights are not brought anywhere: what the server answers depends on prompt and seed."""

    def __init__(self, url: str) -> None:
        super().__init__(url, "policy", retries=0, timeout=20.0)

    def load(self) -> None:
        pass


def answer(body: dict[str, Any], number: int) -> tuple[int, Any]:
    """Bytes drawn by the prompt and the seed; some answers are longer than asked for."""
    chance = torch.Generator().manual_seed(body["seed"] + sum(body["prompt"]))
    length = int(torch.randint(1, 9, (), generator=chance))
    ids = torch.randint(97, 123, (length,), generator=chance).tolist()
    logs = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": [-1.0] * length}
    return 200, {"choices": [{"finish_reason": "stop", "token_ids": ids, "logprobs": logs}]}


def serve(model: list[Any], args: Namespace) -> Engine:
    if dist.get_rank():
        return Engine(NOBODY)  # never asked
    server = Server()
    server.answer = answer
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return Engine(server.url)


def nobody(model: list[Any], args: Namespace) -> Engine:
    return Engine(NOBODY)
