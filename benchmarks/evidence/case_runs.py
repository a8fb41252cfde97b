"""The runs of cases, seeds and arms, as `megatron_dr.compare` runs them."""

import dataclasses
import shlex
from pathlib import Path

import cases
from cases import ROLES, TEST, Case, Data
from families import FIRST_HALF, STEPS, Arm

from megatron_dr.compare.jobs import Job, job

demo = cases.alpha.demo
MICRO, RANKS = 16, 1  # samples that are evaluated at once; processes of a run
MEMORY = 2**30  # bytes of a process, at most
SLOW = "--lr 1e-30 --min-lr 0 --lr-warmup-iters 0"  # a step after which weights are as before


@dataclasses.dataclass(frozen=True)
class Run:
    """A job, and what it is of. `arm` None: what the arms of the case begin from."""

    case: Case
    arm: Arm | None
    seed: int
    data: Data
    job: Job


def base(out: Path, number: int) -> Job:
    """A base model's training: prose in five languages."""
    folder = out / "base" / str(number)
    wide = cases.WIDE if number == 3 else ""
    seed = cases.BASES[number]
    flags = f"{demo.MODEL} {wide} {demo.PRETRAIN} --seed {seed} --save {_q(folder)}"
    return job(f"base {number}", 0, demo.PRETRAIN_STEPS, folder, flags)


def runs(out: Path, case: Case, seed: int, arms: list[Arm]) -> tuple[list[Run], list[Job]]:
    """(the runs that are reported, those that must be done before)."""
    data, start = cases.write(case, seed, out), base(out, case.base)
    folder = out / case.name / str(seed)
    variant = case.variant
    model = f"{demo.MODEL} {cases.WIDE if variant.wide else ''}"
    if not variant.sharded:
        model = model.replace("--use-distributed-optimizer", "")
    common = (f"{model} {demo.TUNE} {evaluated(data, variant.longer * STEPS)} --seed {seed} "
              f"{variant.flags}")  # fmt: skip

    def made(name: str, arm: Arm, origin: Job, more: str = "") -> Job:
        target = demo.TARGET.format(target=_q(data.target)) if arm.uses_target else ""
        steps = arm.steps * (variant.longer if arm is not UNTRAINED else 1)
        flags = (f"{common} --train-data-path {_q(data.pool)} --load {_q(origin.folder)} "
                 f"--train-iters {steps} {target} {arm.flags} {more}")  # fmt: skip
        to = folder / name.replace(", ", "-").replace(" ", "-").replace("α", "alpha")
        return job(f"{case.name}: {name}", seed, steps, to, flags,
                   after=origin.folder, origin=origin.fingerprint)  # fmt: skip

    before = [start]
    found = [Run(case, None, seed, data, made("before", UNTRAINED, start, SLOW))]
    if any(arm.is_second for arm in arms):
        to = folder / "first-half"
        more = f"--save {_q(to)} --save-interval {variant.longer * FIRST_HALF.steps}"
        before.append(made("first half", FIRST_HALF, start, more))
    for arm in arms:
        origin = before[-1] if arm.is_second else start
        # what is stopped early has the learning rates of a whole run until then
        more = "" if arm.is_second else f"--lr-decay-iters {variant.longer * STEPS}"
        found.append(Run(case, arm, seed, data, made(arm.name, arm, origin, more)))
    return found, before


UNTRAINED = Arm("before", "", "--dr-set mean", steps=1, uses_target=False)


def evaluated(data: Data, steps: int = STEPS) -> str:
    """Flags of what is evaluated at a run's end. Megatron takes as many samples of every set, so
    that validation, a third of the test, is gone through three times, which changes no mean."""
    files = {key: _q(path) for key, path in data.held_out.items()}
    target, general = ROLES
    return f"""--eval-interval {steps + 1} --eval-iters {TEST // (MICRO * RANKS)}
        --eval-micro-batch-size {MICRO} --eval-global-batch-size {MICRO * RANKS}
        --valid-data-path {files[general, "valid"]} --test-data-path {files[general, "test"]}
        --dr-target-valid-data {files[target, "valid"]}
        --dr-target-test-data {files[target, "test"]}"""


def _q(path: Path) -> str:
    return shlex.quote(str(path))
