"""The runs of a comparison: a short one that is timed, a base model's, and each arm's."""

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_dr.compare.arms import Arm
from megatron_dr.compare.budget import EVALUATIONS, SETS
from megatron_dr.compare.generated import Metrics
from megatron_dr.compare.jobs import Job, job
from megatron_dr.compare.splits import Splits

TIMED = 6  # steps of the short run
BASE_STEPS = 400  # of a base model from scratch, where the budget allows

SMALL = """
    --num-layers 2 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 384 --seq-length 64
    --max-position-embeddings 65536 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --hidden-dropout 0
    --attention-dropout 0 --make-vocab-size-divisible-by 8 --adam-beta2 0.95 --lr 2e-3
"""
LOADED = "--seq-length 512 --hidden-dropout 0 --attention-dropout 0 --lr 1e-5"
BATCH = 16
TOKENS = "--dr-generate-tokens"
COMMON = f"""
    --use-distributed-optimizer --log-interval 20 --micro-batch-size 1 --global-batch-size {BATCH}
    --lr-decay-style linear --min-lr 0
"""
BASE = """
    --micro-batch-size 16 --global-batch-size 32 --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine
    --seed 1
"""
# What a comparison gives itself; the rest of megatron_dr.train's flags is the user's.
OWN = set("""
    --data-path --train-data-path --valid-data-path --test-data-path --split --data-args-path
    --per-split-data-args-path --mock-data --dr-target-data --dr-target-valid-data --dr-set
    --dr-target-test-data --dr-keep-best --dr-alpha --dr-alpha-style --dr-end-alpha --dr-fraction
    --dr-metrics --seed --train-iters
    --train-samples --save --load --ckpt-step --save-interval --finetune --no-load-optim
    --no-load-rng --pretrained-checkpoint --eval-interval --eval-iters --eval-micro-batch-size
    --eval-global-batch-size --full-validation --multiple-validation-sets --validation-set-names
    --tokenizer-type --tokenizer-model --lr-warmup-iters --lr-warmup-samples --lr-warmup-fraction
    --lr-decay-iters --skip-train --dr-dpo-beta --dr-rl-algorithm --dr-generate
    --dr-generate-metrics
""".split())  # fmt: skip


@dataclass(frozen=True)
class Start:
    """What the arms begin from.

    Attributes:
        flags: of the model and its tokenizer.
        checkpoint: to load; None: a base model is trained first.
        digest: of model and tokenizer.
    """

    flags: str
    checkpoint: Path | None
    digest: str


@dataclass(frozen=True)
class Plan:
    """What all runs have in common, and how they are made of it."""

    out: Path
    start: Start
    splits: Splits
    target_batch: int
    more: tuple[str, ...]  # the user's flags
    device: str
    data_ranks: int
    metrics: Metrics | None = None

    @property
    def batch(self) -> int:
        """General samples of a step."""
        return number(self.more, "--global-batch-size", BATCH)

    def timed(self, arm: Arm) -> Job:
        """A short run. At so small a learning rate weights stay as they are (0 would be nothing to
        divide by): its losses are those of what is loaded."""
        flags = f"{self._common(TIMED, TIMED + 1)} {self._load()} {self._role(arm)}"
        rate = "--lr 1e-30 --min-lr 0 --lr-warmup-init 0"
        last = f"{flags} {shlex.join(self.more)} --seed 1 {rate}"
        name, folder = f"timing {arm.name}", self.out / f"timed-{_folder(arm)}"
        return job(name, 0, TIMED, folder, last, origin=self.start.digest)

    def base(self, steps: int) -> Job:
        """The small model's first training, on the general data alone."""
        own = shlex.join(self._megatron_flags())
        flags = (f"{self._common(steps, steps + 1)} {own} {BASE} --lr-warmup-fraction 0.05 "
                 f"--train-data-path {_q(self.splits.files['general']['train'])} --dr-set mean "
                 f"--save {_q(self.out / 'base')} --save-interval {steps}")  # fmt: skip
        return job("base", 0, steps, self.out / "base", flags, origin=self.start.digest)

    def arm(self, arm: Arm, seed: int, steps: int, base: Job | None) -> Job:
        """A run of an arm."""
        every = max(1, -(-steps // EVALUATIONS))
        flags = (f"{self._common(steps, every)} --lr-warmup-fraction 0.1 {self._load()} "
                 f"{self._role(arm)} --seed {seed} {shlex.join(self.more)}")  # fmt: skip
        if base is not None:
            flags += f" --load {_q(base.folder)} --finetune --no-load-optim --no-load-rng"
        folder = self.out / f"{_folder(arm)}-seed-{seed}"
        made = job(arm.name, seed, steps, folder, flags, origin=self.start.digest)
        if base is None:
            return made
        return replace(made, after=base.folder, origin=base.fingerprint)

    def _common(self, steps: int, every: int) -> str:
        """Model, schedule and the four sets that are evaluated, each as a whole.

        Megatron takes one sequence of a rank at a time there.
        """
        files = self.splits.files
        sets = [files[role][part] for part in ("valid", "test") for role in ("target", "general")]
        return f"""{COMMON} {self.start.flags} --dr-device {self.device}
            --train-iters {steps} --eval-interval {every} --eval-iters 1
            --eval-micro-batch-size 1 --eval-global-batch-size {self.data_ranks}
            --multiple-validation-sets --full-validation
            --valid-data-path {" ".join(map(_q, sets))} --validation-set-names {" ".join(SETS)}
            {self._generate()}"""

    def _generate(self) -> str:
        """The base model's run has these, too, and none of the user's own."""
        if self.metrics is None:
            return ""
        length = number(self.more, TOKENS, 0)
        more = (TOKENS, str(length)) if length else ()
        return shlex.join((*self.metrics.flags, *more))

    def _load(self) -> str:
        found = self.start.checkpoint
        if found is None:
            return ""
        return f"--load {_q(found)} --finetune --no-load-optim --no-load-rng"

    def _role(self, arm: Arm) -> str:
        files = self.splits.files
        target = (f"--dr-target-data {_q(files['target']['train'])} "
                  f"--dr-target-batch-size {self.target_batch}")  # fmt: skip
        return (f"--train-data-path {_q(files['general']['train'])} {arm.flags} "
                f"{target if arm.uses_target else ''}")  # fmt: skip

    def _megatron_flags(self) -> list[str]:
        """The user's, without the plugin's and what goes with each of these."""
        kept, keeps = [], True
        for word in self.more:
            if word.startswith("--"):
                keeps = not word.startswith("--dr-")
            kept += [word] if keeps else []
        return kept


def _folder(arm: Arm) -> str:
    return arm.name.replace(":", "-")


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def check_flags(words: list[str]) -> None:
    """Refuse what is not a flag of a run, or what a comparison gives itself.

    Raises:
        ValueError: the first of these.
    """
    if words and not words[0].startswith("--"):
        raise ValueError(f"{words[0]}: no such argument; flags of megatron_dr.train begin with --.")
    for word in words:
        name = word.partition("=")[0]
        if name in OWN or name.startswith(("--dr-rl-", "--dr-dpo-")):
            raise ValueError(f"{name}: compare gives the runs this itself, or trains otherwise: "
                             "drop it (megatron-dr compare --help).")  # fmt: skip


def data_ranks(words: Sequence[str], ranks: int) -> int:
    """Data-parallel ranks of a run with these flags.

    Raises:
        ValueError: its layout does not divide the ranks.
    """
    kinds = ("tensor-model", "pipeline-model", "context")
    size = math.prod(number(words, f"--{kind}-parallel-size", 1) for kind in kinds)
    if ranks % size:
        raise ValueError(f"--ranks {ranks} must be a multiple of the {size} ranks of a model.")
    return ranks // size


def number(words: Sequence[str], flag: str, default: int) -> int:
    """What a flag says among others; Megatron says what is wrong with it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, default="", dest="it")
    found = parser.parse_known_args(list(words))[0].it
    return int(found) if found.isdigit() and int(found) else default
