"""The training entry on ranks: its data, its flags, and what it printed."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from megatron_dr.mcore.loop import train
from megatron_dr.report import metrics

from ._ranks import run_ranks

ROOT = Path(__file__).parents[2]
SENTENCES = [
    "El temor del Señor es el principio.", "The fear of the Lord is the start.",
    "Der Herr ist mein Hirte, mir wird.", "Il Signore è il mio pastore: nulla.",
]  # fmt: skip
MODEL = f"""
    --dr-device cpu --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --hidden-dropout 0 --attention-dropout 0
    --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 8
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model {ROOT / "examples/sft/tokenizer"}
    --use-distributed-optimizer --lr 1e-2 --lr-decay-style constant
    --micro-batch-size 1 --global-batch-size 8 --eval-iters 1 --eval-interval 3 --log-interval 1
"""


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    paths = {}
    for name, count in (("general", 40), ("target", 6), ("held_out", 8)):
        path = tmp_path / f"{name}.jsonl"
        lines = [{"text": f"{n} {SENTENCES[n % 4]}"} for n in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths[name] = str(path)
    return paths


def flags(data: dict[str, str], more: str = "", iterations: int = 6) -> list[str]:
    return f"""{MODEL} --train-iters {iterations} --train-data-path {data["general"]}
        --valid-data-path {data["held_out"]} {more}""".split()


def launch(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: exit code, stdout and stderr of the entry."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    sys.argv = ["megatron_dr.train", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            train.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return code, out.getvalue(), error.getvalue()


def run(argv: list[str], world: int = 2) -> list[tuple[int, str, str]]:
    return run_ranks(world, launch, argv)


def unjudged(data: dict[str, str]) -> str:
    return f"--dr-target-data {data['target']} --dr-target-batch-size 4 --dr-slots 2"


def cone(data: dict[str, str]) -> str:
    return f"{unjudged(data)} --dr-target-valid-data {data['held_out']}"


def losses(path: Path, kind: str) -> dict[int, tuple[float, float]]:
    lines = metrics.read(path, kind)
    return {line["iteration"]: (line["lm loss"], line["target loss"]) for line in lines}


def two_corpora(data: dict[str, str], tmp_path: Path) -> str:
    lines = Path(data["general"]).read_text().splitlines(keepends=True)
    paths = [tmp_path / "english.jsonl", tmp_path / "german.jsonl"]
    for number, path in enumerate(paths):
        path.write_text("".join(lines[number::2]))
    return f"--train-data-path 0.75 {paths[0]} 0.25 {paths[1]}"
