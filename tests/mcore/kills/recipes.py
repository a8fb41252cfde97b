"""Small runs, one of each kind of state that a resume brings back.

Saved after every second step; the flags are those of the first start and of every resume.
"""

import json
from pathlib import Path
from typing import NamedTuple

from .. import _dpo, _rl
from .._train import MODEL, SENTENCES

STEPS, INTERVAL = 6, 2
_KEPT = f"""--train-iters {STEPS} --save-interval {INTERVAL} --eval-interval 4 --eval-iters 1
    --global-batch-size 4 --exit-signal-handler --make-vocab-size-divisible-by 136"""
# by parameter: Megatron's other format of the distributed optimizer keeps memory that is never set
_BY_PARAMETER = "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
_TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
_PP2 = "--pipeline-model-parallel-size 2"
_SAMPLES = "--dr-rows sample --micro-batch-size 2 --dr-norm tokens --dr-blocks matrix"
_OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
_ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
_FILTER = "--dr-set filter --dr-fraction 1"
_PPO = "--dr-rl-algorithm ppo --dr-rl-kl-target 0.01"
_MOE = """--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2 --moe-aux-loss-coeff 0.01
    --moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall"""
_RECORD = "--dr-record {run}/record --dr-record-every 2"


class Recipe(NamedTuple):
    """Flags beside those that all have.

    Attributes:
        world: ranks.
        data: "text", "two" corpora, "pairs" or "prompts".
        distributed: whether the optimizer is.
    """

    world: int
    more: str
    data: str = "text"
    distributed: bool = True


RECIPES = {
    "dense": Recipe(1, "--dr-slots 2 --dr-log-blocks --dr-keep-best --save-retain-interval 4"),
    "async": Recipe(2, f"{_ASYNC} --dr-slots 2 --dr-keep-best --save-retain-interval 4"),
    "dp2 overlapped": Recipe(2, f"--dr-slots 2 --dr-gram exact {_OVERLAP} {_RECORD}"),
    "dp4 target ranks": Recipe(4, f"--dr-rows rank --dr-target-ranks 1 --dr-gram exact {_OVERLAP}"),
    "tp2": Recipe(2, f"{_TP2} --dr-slots 2 --dr-keep-best"),
    "pp2": Recipe(2, f"{_PP2} --dr-slots 2 --dr-target-test-data {{held_out}}"),
    "tp2 pp2": Recipe(4, f"{_TP2} {_PP2} --dr-slots 2"),
    "ep2": Recipe(2, f"--expert-model-parallel-size 2 {_MOE} --dr-slots 2"),
    "cp2": Recipe(2, "--context-parallel-size 2 --calculate-per-token-loss --dr-slots 2"),
    "streaming": Recipe(2, f"{_SAMPLES} --dr-set topk --dr-fraction 0.5 --dr-window streaming"),
    "refreshed": Recipe(2, f"{_SAMPLES} {_TP2} {_FILTER} --dr-alpha 0 --dr-target-refresh 3"),
    "domains": Recipe(2, f"--dr-rows domain --dr-blocks layer {_RECORD}", "two"),
    "packs": Recipe(2, "--dr-pack --dr-slots 2"),
    "lora": Recipe(2, "--dr-lora-rank 4 --dr-lora-alpha 8 --dr-lora-dropout 0.1 --dr-slots 2"),
    "meso": Recipe(
        2, "--dr-meso-size 8 --dr-meso-refresh 3 --dr-slots 2", distributed=False
    ),
    "dpo": Recipe(
        2, "--dr-dpo-beta 0.1 --micro-batch-size 2 --global-batch-size 8 --dr-slots 2 "
        "--dr-set cone", "pairs",
    ),
    "grpo": Recipe(2, "--dr-rl-algorithm grpo --dr-slots 2", "prompts"),
    "ppo": Recipe(2, f"{_PPO} {_TP2} --dr-slots 2", "prompts"),
}  # fmt: skip
_RL = f"""--dr-rl-reward {_rl.REWARD} --dr-rl-prompts 2 --dr-rl-group 4 --dr-rl-epochs 2
    --dr-rl-max-tokens 6 --dr-rl-target-prompts 2 --dr-rl-stop e --seed 5"""


def write_data(folder: Path) -> None:
    """What all recipes train on."""
    for name, count in (("general", 40), ("target", 6), ("held_out", 8), ("other", 24)):
        _write(
            folder / f"{name}.jsonl", [{"text": f"{n} {SENTENCES[n % 4]}"} for n in range(count)]
        )
        pairs = [_dpo.record(n + count) for n in range(count)]
        _write(folder / f"{name}.pairs.jsonl", pairs)
    (folder / "prompts").mkdir()
    _rl.write_prompts(folder / "prompts")


def _write(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def flags(recipe: Recipe, data: Path, run: Path) -> list[str]:
    """Of the entry; its own files are in the folder `run`."""
    ending = ".pairs.jsonl" if recipe.data == "pairs" else ".jsonl"
    of = data / "prompts" if recipe.data == "prompts" else data
    paths = {name: str(of / (name + ending)) for name in ("general", "target", "held_out")}
    trained = f"--train-data-path {paths['general']} --valid-data-path {paths['held_out']}"
    if recipe.data == "two":
        trained = f"""--train-data-path 0.75 {paths["general"]} 0.25 {data / "other.jsonl"}
            --valid-data-path {paths["held_out"]}"""
    if recipe.data == "prompts":
        trained = f"--data-path {paths['general']} --dr-rl-valid-data {paths['held_out']} {_RL}"
    optimizer = _BY_PARAMETER if recipe.distributed else ""
    model = MODEL.replace("--use-distributed-optimizer", optimizer)
    text = f"""{model} {_KEPT} {trained} --dr-target-data {paths["target"]}
        --dr-target-batch-size 4 --dr-target-valid-data {paths["held_out"]}
        --save {run}/saved --load {run}/saved --dr-metrics {run}/metrics.jsonl
        {recipe.more.format(run=run, **paths)}"""
    return text.split()
