"""Runs of the training entry that train by rewards, small, and what they leave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config

from megatron_dr.mcore.loop import adaptor

from . import _megatron
from ._ranks import run_ranks
from ._train import MODEL, SENTENCES, launch

Data = dict[str, Any]
REWARD = "tests.mcore._rewards:vowels"
# 4 prompts x 4 completions x 2 epochs in batches of 8: four steps in a cycle
RL = f"""{MODEL} --num-layers 4 --make-vocab-size-divisible-by 136 --seed 5
    --dr-rl-algorithm grpo --dr-rl-reward {REWARD} --dr-rl-prompts 4 --dr-rl-group 4
    --dr-rl-epochs 2 --dr-rl-max-tokens 6 --dr-rl-target-prompts 2 --dr-rl-stop e
    --adam-eps 1e-6 --no-load-rng --save-interval 100 --dist-ckpt-optim-fully-reshardable"""

SAME = ("policy loss", "target policy loss", "kl", "target kl", "reward", "target reward",
        "response length", "truncated")  # fmt: skip


def write_prompts(folder: Path) -> dict[str, str]:
    paths = {}
    for name, count in (("general", 9), ("target", 5), ("held_out", 3)):
        path = folder / f"{name}.jsonl"
        lines = [
            {"prompt": f"{n} {SENTENCES[n % 4][: 3 + 2 * n]}", "answer": n % 3}
            for n in range(count)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[name] = str(path)
    return paths


def run(data: dict[str, str], more: str, steps: int, world: int = 1) -> Any:
    """(exit code, stdout, stderr, pieces of parameters) of every rank."""
    argv = f"{RL} --data-path {data['general']} --train-iters {steps} {more}".split()
    return run_ranks(world, _run, argv)


def _run(argv: list[str]) -> Any:
    torch.distributed.destroy_process_group = lambda: None  # the pieces are asked for after it
    ended = launch(argv)
    if ended[0]:
        return *ended, []
    model = adaptor._run.handle.model
    return *ended, _megatron.pieces(model, get_model_config(model[0]))


def parameters(ended: Any) -> dict[str, torch.Tensor]:
    """The model's parameters at a run's end, whole, by name; every rank ended well."""
    for code, _, error, _ in ended:
        assert code == 0, error
    return _megatron.whole([pieces for *_, pieces in ended])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Prompts, and a model to begin with: Megatron draws parameters by stage."""
    folder = tmp_path_factory.mktemp("rl")
    found: Data = write_prompts(folder)
    found["base"] = folder / "base"
    found["start"] = parameters(run(found, f"--save {found['base']}", 1))
    return found


def from_base(data: Data) -> str:
    return f"--load {data['base']} --finetune --no-load-optim"


def regularised(data: Data, slots: int = 8) -> str:
    """With one sequence in a row, rows don't depend on the number of data ranks."""
    return f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-slots {slots}
        --dr-set cone --dr-blocks layer --dr-rl-valid-data {data["held_out"]}
        --dr-target-valid-data {data["held_out"]}"""
