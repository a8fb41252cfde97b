"""A schedule of the learning rate that can't be, or that a checkpoint has otherwise."""

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import pytest
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.mcore.loop import rate

from ._train import data, flags, run, unjudged

__all__ = ["data"]

SAMPLES = "--train-samples 80"
FAULTS = {
    "--lr-warmup-iters 10": "--lr-warmup-iters 10 must be from 0 and shorter than --train-iters 10",
    "--lr-warmup-iters 4 --lr-decay-iters 3": "shorter than --lr-decay-iters 3, in which",
    "--lr-warmup-fraction 1": "--lr-warmup-fraction 1.0 must be from 0 and shorter than --train-it",
    "--lr-warmup-fraction 0.1 --lr-warmup-iters 1": "--lr-warmup-iters 1 and --lr-warmup-fraction",
    "--lr-decay-iters 0": "shorter than --lr-decay-iters 0",
    f"{SAMPLES} --lr-warmup-samples 80": "--lr-warmup-samples 80 must be from 0 and shorter than "
    "--train-samples 80",
    f"{SAMPLES} --lr-warmup-iters 1": "--lr-warmup-iters beside --train-samples: give all lengths",
    f"{SAMPLES} --train-iters 2": "--train-iters beside --train-samples",
    "--lr-decay-samples 8": "--lr-decay-samples beside --train-iters",
    "--min-lr 2": "--min-lr 2.0 must be from 0 to --lr 1.0.",
    "--min-lr -1": "--min-lr -1.0 must be from 0 to --lr 1.0.",
    "--lr-warmup-init 2": "--lr-warmup-init 2.0 must be at most --lr 1.0.",
    "--lr-decay-style WSD": "WSD needs --lr-wsd-decay-iters",
    "--end-weight-decay 1": "--start-weight-decay and --end-weight-decay need --weight-decay-incr-",
    "--weight-decay-incr-style linear --start-weight-decay 1": "needs --start-weight-decay from 0",
    "--weight-decay-incr-style cosine --start-weight-decay 1 --end-weight-decay 0.5": "needs --sta",
    "--override-opt_param-scheduler --use-checkpoint-opt_param-scheduler": "drop one.",
}


def parsed(*given: str) -> Namespace:
    parser = ArgumentParser(allow_abbrev=False)
    more = [] if "--train-samples" in given else ["--train-iters", "10"]
    args: Namespace = add_megatron_arguments(parser).parse_args([*more, *given])
    return args


@pytest.mark.parametrize("given, sentence", FAULTS.items())
def test_what_makes_no_schedule(given: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        rate.check(parsed("--lr", "1", *given.split()))
    assert sentence in str(refused.value)


@pytest.mark.parametrize("given", [
    "", "--lr-warmup-iters 9", "--lr-warmup-iters 10 --lr-decay-iters 11",
    "--lr-warmup-fraction 0.9", f"{SAMPLES} --lr-warmup-samples 79",
    "--lr-decay-style WSD --lr-wsd-decay-iters 3",
    "--min-lr 1 --lr-warmup-init 1", "--override-opt_param-scheduler",
    "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1",
])  # fmt: skip
def test_what_makes_one(given: str) -> None:
    rate.check(parsed("--lr", "1", *given.split()))


def test_no_rate_is_refused_and_none_is_needed_to_validate() -> None:
    with pytest.raises(ValueError, match="no learning rate: give --lr."):
        rate.check(parsed())
    rate.check(parsed("--skip-train", "--lr-warmup-iters", "99"))


def schedule(**changed: Any) -> OptimizerParamScheduler:
    given: dict[str, Any] = dict(
        init_lr=0.0, max_lr=1.0, min_lr=0.0, lr_warmup_steps=8, lr_decay_steps=80,
        lr_decay_style="linear", start_wd=0.1, end_wd=0.1, wd_incr_steps=80,
        wd_incr_style="constant",
    )  # fmt: skip
    return OptimizerParamScheduler(
        Namespace(param_groups=[]), **given | changed,
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=False,
    )  # fmt: skip


CHANGED = {
    "max_lr": (2.0, "(--lr)"), "min_lr": (0.5, "(--min-lr)"),
    "lr_warmup_steps": (4, "(--lr-warmup-iters or -fraction)"),
    "lr_decay_steps": (96, "(--lr-decay-iters, --train-iters, --global-batch-size)"),
    "lr_decay_style": ("cosine", "(--lr-decay-style)"),
    "start_wd": (0.05, "(--weight-decay, --start-weight-decay)"),
    "end_wd": (0.2, "(--weight-decay, --end-weight-decay)"),
    "wd_incr_steps": (96, "(--train-iters, --global-batch-size)"),
    "wd_incr_style": ("linear", "(--weight-decay-incr-style)"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_all_that_megatron_asserts_on_has_its_flag(name: str) -> None:
    """And nothing else: where it takes the state of a checkpoint, nothing is refused."""
    new, said = CHANGED[name]
    now, then = schedule(**{name: new}), schedule().state_dict()
    with pytest.raises(AssertionError):
        now.load_state_dict(then)
    args = parsed("--lr", "1", "--load", "runs/a")
    with pytest.raises(ValueError) as refused:
        rate.check_resumed(args, now.state_dict(), then)
    assert f": {name} was {then[name]} and is {new} {said}. Give" in str(refused.value)
    other = schedule(**{name: new}).state_dict() | {"num_steps": 24}
    rate.check_resumed(args, now.state_dict(), other)
    assert now.load_state_dict(other) is None


@pytest.mark.soak
def test_a_resume_with_another_length(data: dict[str, str], tmp_path: Path) -> None:
    """Refused in one sentence, unless it is said which schedule counts."""
    folder = tmp_path / "saved"
    common = (
        f"{unjudged(data)} --eval-iters 0 --save {folder} --save-interval 2 --lr-decay-style linear"
    )
    assert run(flags(data, f"{common} --exit-interval 2", 4), 1)[0][0] == 0
    longer = f"{common} --load {folder}"
    (code, out, error), (other, _, _) = run(flags(data, longer, 6))
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert code == other == 2 and len(said) == 1, error[-2000:]
    assert "lr_decay_steps was 32 and is 48 (--lr-decay-iters, --train-iters, --global" in said[0]
    assert "--override-opt_param-scheduler for this run's schedule, or --use-checkpoint-" in said[0]
    rates = []
    for which in ("override", "use-checkpoint"):
        more = f"--{which}-opt_param-scheduler --save {tmp_path / which}"
        code, out, error = run(flags(data, f"{longer} {more}", 6), 1)[0]
        assert code == 0, error[-2000:]
        found = re.findall(r"iteration +(\d)/.*learning rate: (\S+)", out)
        rates.append({int(step): float(value) for step, value in found})
    # logged is the rate of the next step
    assert rates[0][3] == pytest.approx(1e-2 * 3 / 6) and rates[1][3] == pytest.approx(1e-2 / 4)
