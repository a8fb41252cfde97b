"""Small runs of the training entry on preference pairs, and the same in float64 in one process."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from megatron_dr.data.order import EpochOrder

from . import _megatron, _oracle, _problem, _rl
from ._data import Layout
from ._oracle import Parameters
from ._problem import Problem
from ._ranks import run_ranks
from ._train import MODEL, ROOT, SENTENCES

SEED, BATCH, MICRO, TARGETS, STEPS = 5, 8, 2, 4, 3
BETA, SMOOTHING = 0.5, 0.1
PROBLEM = Problem(set="cone", alpha=0.2)
# what a row is, of which window, in which blocks: in the oracle, and as flags for so many slots
ROWS = {
    "slot": ("slot", BATCH, "layer", "--dr-blocks layer --dr-gram exact --dr-slots {slots}"),
    "step": ("pair", BATCH, "layer", """--dr-rows sample --dr-window step --dr-score exact
             --dr-blocks layer"""),
    "microbatch": ("pair", MICRO, "matrix", "--dr-rows sample --dr-score ghost --dr-blocks matrix"),
}  # fmt: skip
DPO = f"""{MODEL} --make-vocab-size-divisible-by 136 --seed {SEED} --init-method-std 0.1
    --group-query-attention --num-query-groups 2 --dr-dpo-beta {BETA}
    --dr-dpo-label-smoothing {SMOOTHING} --micro-batch-size {MICRO} --weight-decay 0
    --adam-eps {_megatron.EPS} --clip-grad {_megatron.CLIP} --adam-beta2 0.999
    --no-load-rng --save-interval 100 --dist-ckpt-optim-fully-reshardable"""
Data = dict[str, Any]


def record(n: int) -> dict[str, str]:
    text = SENTENCES[n % 4]
    prompt = f"{n} {text[: 2 + n % 17]}"
    return {"prompt": prompt, "chosen": text[-9 + n % 5 :], "rejected": text[5:13]}


def run(data: Data, more: str, steps: int = STEPS, world: int = 1) -> Any:
    argv = f"""{DPO} --train-data-path {data["general"]} --valid-data-path {data["held_out"]}
        --train-iters {steps} {more}"""
    return run_ranks(world, _rl._run, argv.split())


def regularised(data: Data, rows: str, slots: int) -> str:
    """A slot is a microbatch of two pairs, so that rows don't depend on the data ranks."""
    return f"""--load {data["base"]} --finetune --no-load-optim --dr-target-data {data["target"]}
        --dr-target-batch-size {TARGETS} --dr-target-valid-data {data["held_out"]}
        --dr-set cone --dr-ridge {PROBLEM.ridge} --dr-alpha {PROBLEM.alpha} --dr-norm general
        {ROWS[rows][-1].format(slots=slots)}"""


# -- one process, float64, one pair after the other ------------------------------------------------
def tokens(path: str) -> list[list[tuple[list[int], int]]]:
    """Of each pair, chosen and rejected: token ids, and how many are the prompt's."""
    tokenizer = Tokenizer.from_file(str(ROOT / "examples/sft/tokenizer/tokenizer.json"))
    end = tokenizer.token_to_id("<|end|>")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    pairs = []
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        prompt = encode(row["prompt"])
        pairs.append([([*prompt, *encode(row[side]), end], len(prompt))
                      for side in ("chosen", "rejected")])  # fmt: skip
    return pairs


def log_prob(p: Parameters, answer: tuple[list[int], int]) -> torch.Tensor:
    ids, first = torch.tensor(answer[0]), answer[1]
    return -_oracle.token_losses(p, ids[:-1], ids[1:])[first - 1 :].sum()


class OracleRun:
    """Steps of DPO with cones of rows; what is logged of each, and of the held-out pairs."""

    def __init__(self, data: Data, rows: str) -> None:
        self.row, self.window, self.blocks, _ = ROWS[rows]
        shapes = _oracle.shapes(Layout())
        self.p = {n: data["start"][n].double().view(s).requires_grad_() for n, s in shapes.items()}
        assert self.p.keys() == data["start"].keys()
        self.pairs = {name: tokens(data[name]) for name in ("general", "target", "held_out")}
        with torch.no_grad():
            self.reference = {name: [[log_prob(self.p, side) for side in pair] for pair in pairs]
                              for name, pairs in self.pairs.items()}  # fmt: skip
        optimizer = torch.optim.AdamW(self.p.values(), lr=1e-2, eps=_megatron.EPS, weight_decay=0.0)
        self.logged: list[dict[str, float]] = []
        for step in range(STEPS):
            self.train(optimizer, step)
        numbers = list(range(len(self.pairs["held_out"])))
        held_out = self.logs("held_out", numbers)
        self.validated = held_out | {f"target {name}": value for name, value in held_out.items()}

    def loss(self, role: str, n: int) -> tuple[torch.Tensor, dict[str, float]]:
        chosen, rejected = (
            log_prob(self.p, side) - known
            for side, known in zip(self.pairs[role][n], self.reference[role][n], strict=True)
        )
        h = BETA * (chosen - rejected)
        right, wrong = torch.sigmoid(h).log(), torch.sigmoid(-h).log()
        loss = -(1 - SMOOTHING) * right - SMOOTHING * wrong
        return loss, {
            "dpo loss": float(loss), "accuracy": float(h > 0), "margin": float(h),
            "chosen log ratio": float(chosen), "rejected log ratio": float(rejected),
        }  # fmt: skip

    def logs(self, role: str, numbers: list[int]) -> dict[str, float]:
        found = [self.loss(role, n)[1] for n in numbers]
        return {name: sum(f[name] for f in found) / len(found) for name in found[0]}

    def gradient(self, role: str, numbers: list[int]) -> Parameters:
        loss = torch.stack([self.loss(role, n)[0] for n in numbers]).mean()
        return dict(zip(self.p, torch.autograd.grad(loss, list(self.p.values())), strict=True))

    def rows(self, window: list[int]) -> list[Parameters]:
        size = MICRO if self.row == "slot" else 1
        return [self.gradient("general", window[n : n + size]) for n in range(0, len(window), size)]

    def train(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        orders = {r: EpochOrder(len(self.pairs[r]), SEED) for r in ("general", "target")}
        general = [orders["general"][step * BATCH + n] for n in range(BATCH)]
        target = [orders["target"][step * TARGETS + n] for n in range(TARGETS)]
        about = self.logs("target", target)
        self.logged.append(
            self.logs("general", general) | {f"target {name}": v for name, v in about.items()}
        )
        t, problem = self.gradient("target", target), replace(PROBLEM, blocks=self.blocks)
        windows = [general[n : n + self.window] for n in range(0, BATCH, self.window)]
        updates = [_problem.project(problem, self.rows(window), t)[0] for window in windows]
        update = {name: sum(u[name] for u in updates) / len(updates) for name in t}
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in self.p.items():
            value.grad = update[name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
