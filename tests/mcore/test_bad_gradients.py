"""A role's gradient with NaN or Inf on one rank: left out, or its step is, or the run ends."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.loop import forward
from megatron_dr.mcore.step.bad import BadGradient
from megatron_dr.report import metrics

from . import _data, _layouts, _megatron, _oracle, _problem, _samples, _train
from ._data import Layout
from ._oracle import Parameters
from ._problem import Problem
from ._ranks import run_ranks
from ._samples import Case
from ._train import data

__all__ = ["data"]

STEPS, WRONG = 3, 1  # steps, and the one with a bad batch
Bad = dict[int, tuple[int, ...]]  # microbatches by data rank, the target's counted first


def poison(calls: list[int], wrong: tuple[int, ...], value: float, step: Any, *args: Any) -> Any:
    """A forward step whose output is `value` in some microbatches."""
    output, loss = step(*args)
    calls.append(1)
    return output * (value if len(calls) - 1 in wrong else 1.0), loss


class Trained:
    """A model, its optimizer and its handle, a step at a time."""

    def __init__(self, layout: Layout, dr: DRConfig, initial: Parameters) -> None:
        self.layout = layout
        self.model, self.optimizer, self.config = _megatron.build(layout, initial)
        self.handle = megatron_dr.attach(self.model, self.optimizer, self.config, dr)
        self.applied: list[bool] = []
        self.logs: list[dict[str, float]] = []

    def step(self, step: int, wrong: Bad, value: float = math.nan) -> None:
        layout, rank = self.layout, parallel_state.get_data_parallel_rank()
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        kwargs = _megatron.schedule(layout, self.model, _data.general(layout, step, rank))
        bad = wrong.get(rank, ())
        kwargs["forward_step_func"] = partial(poison, [], bad, value, _megatron.forward_step)
        self.handle.step(
            get_forward_backward_func(),
            target_data_iterator=iter(_data.target(layout, step, rank)),
            num_target_microbatches=layout.num_target,
            domains=_data.domains(layout, rank) if layout.domains else (), **kwargs,
        )  # fmt: skip
        self.applied.append(bool(self.optimizer.step()[0]))
        self.logs.append({k: float(v) for k, v in self.handle.metrics.items()})

    def found(self) -> Any:
        return _megatron.pieces(self.model, self.config), self.applied, self.logs

    def state(self) -> list[Any]:
        """Parameters, moments and what the rule or the rows have gathered, for comparisons."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        moments = [
            value for one in chained for state in one.optimizer.state.values()
            for value in state.values() if isinstance(value, torch.Tensor)
        ]  # fmt: skip
        values = [p.detach() for chunk in self.model for p in chunk.parameters()]
        return [t.tolist() for t in (*values, *moments)] + [str(self.handle.state_dict()["dial"])]


# layout, problem, policy, what is bad of the step WRONG (general rows, or "target"), which
# microbatches that is, and its value
DP2, TP2, PP2 = Layout(dp=2), Layout(tp=2), Layout(pp=2)
SHARDED = Layout(dp=2, distributed_optimizer=True, overlap=True)
TOPK = Problem(set="topk", norm="none")
SKETCH = Problem(gram="sketch", sketch_size=1024)
EVERY = (0, 1, 2, 3)
CASES: dict[str, tuple[Layout, Problem, str, tuple[Any, ...], Bad, float]] = {
    "skip target": (DP2, Problem(), "skip", ("target",), {1: (1,)}, math.nan),
    "skip row": (SHARDED, Problem(), "skip", (3,), {1: (5,)}, math.inf),
    "skip tp2": (TP2, TOPK, "skip", (0,), {0: (5,)}, math.nan),
    "skip pp2": (PP2, Problem(), "skip", ("target",), {0: (0,)}, math.nan),
    "mean target": (DP2, Problem(), "mean", ("target",), {1: (1,)}, math.nan),
    "mean target sharded": (SHARDED, TOPK, "mean", ("target",), {0: (0,)}, math.inf),
    "mean row": (SHARDED, Problem(), "mean", (3,), {1: (5,)}, math.nan),
    "mean rows topk": (DP2, TOPK, "mean", (1, 2), {0: (4,), 1: (2,)}, math.nan),
    "mean row tp2": (TP2, Problem(blocks="layer"), "mean", (0,), {0: (5,)}, math.inf),
    "mean row pp2": (PP2, Problem(), "mean", (3,), {0: (10,)}, math.nan),
    "mean both": (PP2, Problem(), "mean", ("target", 0), {0: (1, 4)}, math.nan),
    "mean all rows": (DP2, Problem(), "mean", EVERY, {0: (2, 4), 1: (3, 5)}, math.nan),
    "mean sketched": (DP2, SKETCH, "mean", (1,), {0: (4,)}, math.nan),
    "mean domain": (Layout(dp=2, domains=2), Problem(), "mean", (1,), {1: (3,)}, math.nan),
}


def train(names: list[str], initial: Parameters) -> list[Any]:
    """On a rank: each case of one layout; and one whose batches are all good."""
    layout = CASES[names[0]][0]
    _megatron.initialize(layout)
    found = []
    for name in names:
        _, problem, policy, _, wrong, value = CASES[name]
        dr = _layouts.config(layout, problem, on_bad_gradient=policy)
        run = Trained(layout, dr, initial)
        for step in range(STEPS):
            run.step(step, wrong if step == WRONG else {}, value)
        found.append(run.found())
    return found


def oracle(layout: Layout, problem: Problem, policy: str, bad: tuple[Any, ...]) -> Parameters:
    """Dense: bad rows are the good ones' mean, a bad target leaves the mean, or nothing is done."""
    p = {k: v.double().requires_grad_() for k, v in _oracle.initial(layout).items()}
    optimizer = torch.optim.AdamW(p.values(), lr=_megatron.LEARNING_RATE, eps=_megatron.EPS,
                                  weight_decay=0.0, betas=(0.9, 0.999))  # fmt: skip
    for step in range(STEPS):
        rows, target = _oracle.rows(layout, p, step)
        good = [row for n, row in enumerate(rows) if step != WRONG or n not in bad]
        if (len(good) < len(rows) or ("target" in bad and step == WRONG)) and policy == "skip":
            continue
        if not good:
            continue
        mean = {k: sum(row[k] for row in good) / len(good) for k in target}
        rows = [row if step != WRONG or n not in bad else mean for n, row in enumerate(rows)]
        update, _ = _problem.project(problem, rows, target, step)
        if step == WRONG and "target" in bad:
            update = mean
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in p.items():
            value.grad = update[name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
    return {k: v.detach() for k, v in p.items()}


@pytest.mark.parametrize("layout", list(dict.fromkeys(case[0] for case in CASES.values())), ids=str)
def test_parameters_are_the_oracles(layout: Layout) -> None:
    names = [name for name, case in CASES.items() if case[0] == layout]
    ranks = run_ranks(layout.world, train, names, _oracle.initial(layout), timeout=400)
    for number, name in enumerate(names):
        _, problem, policy, bad, *_ = CASES[name]
        together = _megatron.whole([rank[number][0] for rank in ranks])
        wanted = oracle(layout.alone, problem, policy, bad)
        for key, value in wanted.items():
            error = float((together[key].double() - value.reshape(-1)).abs().max())
            assert error <= 2e-5, f"{name}: {key}: {error}"
        spoilt = policy == "skip" or set(EVERY) <= set(bad)
        for _, applied, logs in (rank[number] for rank in ranks):
            assert applied == [step != WRONG or not spoilt for step in range(STEPS)], name
            counts = [(log["dr bad target"], log["dr bad general"]) for log in logs]
            rows = len([b for b in bad if b != "target"])
            assert counts[WRONG] == (float("target" in bad), rows), name
            assert counts[0] == counts[2] == (0, 0), name


def without(initial: Parameters, dials: list[dict[str, Any]], wrong: Bad) -> list[Any]:
    """On a rank: per configuration, the state after a run with a step that was left out, and of one
    without that step; and of a good run with each policy."""
    _megatron.initialize(DP2)
    found = []
    for dial in dials:
        dr = _layouts.config(DP2, Problem(), **dial)
        runs = [Trained(DP2, dr, initial) for _ in range(2)]
        for step in range(STEPS):
            runs[0].step(step, wrong if step == WRONG else {})
            if step != WRONG:
                runs[1].step(step, {})
        found.append([run.state() for run in runs])
    good = []
    for policy in ("stop", "skip", "mean"):
        run = Trained(DP2, _layouts.config(DP2, Problem(), on_bad_gradient=policy), initial)
        for step in range(2):
            run.step(step, {})
        good.append(run.state())
    return [found, good]


def test_a_step_that_is_left_out_was_never_there() -> None:
    """Bit for bit: parameters, moments, the rule's averages; and good runs know no policy."""
    auto = {"alpha_style": "auto", "target_size": 40, "alpha_steps": 8, "alpha": 0.05,
            "on_bad_gradient": "skip"}  # fmt: skip
    for found, good in run_ranks(2, without, _oracle.initial(DP2), [auto], {1: (4,)}):
        assert all(one == other for one, other in found)
        assert "nan" not in str(found[0][0][-1]) and "averages" in found[0][0][-1]
        assert good[0] == good[1] == good[2]


def stopped(initial: Parameters, wrong: Bad, dr: DRConfig) -> tuple[str, bool]:
    """On a rank: what the run ends with, and whether its parameters are finite and as before."""
    _megatron.initialize(DP2)
    run = Trained(DP2, dr, initial)
    before = run.state()
    with pytest.raises(BadGradient) as ended:
        run.step(0, wrong)
    return str(ended.value), run.state() == before


def test_stop_ends_every_rank_with_a_sentence_that_names_the_batch(
    capfd: pytest.CaptureFixture[str],
) -> None:
    found = run_ranks(2, stopped, _oracle.initial(DP2), {1: (1, 4)},
                      _layouts.config(DP2, Problem()))  # fmt: skip
    who = "step 0: the gradient of the target and 1 general row has NaN or Inf"
    assert all(text.startswith(who) and same for text, same in found)
    assert re.findall(r"step 0: look at (.*)", capfd.readouterr().out) == [
        "target microbatch 1 of data-parallel rank 1 (rank 1)",
        "general microbatch 2 of data-parallel rank 1 (rank 1)",
    ]


SAMPLES = {
    "streaming": Case(window="streaming"),
    "step": Case(window="step", passes=2, score="ghost"),
    "refresh": Case(target_refresh=2, alpha=0.0),
}


def sample_step(run: Any, case: Case, step: int, bad: int, sample: int) -> None:
    handle, model, optimizer = run
    rank = parallel_state.get_data_parallel_rank()
    wanted = 2 if handle.target_due else 0
    general, target = (
        iter([_samples.batch(DP2, role, step, rank, n, _samples.SAMPLES) for n in range(2)])
        for role in ("general", "target")
    )
    calls: list[int] = []

    def forward_step(data: Any, module: Any) -> Any:
        output, loss = _samples.forward_step(data, module)
        calls.append(1)
        if len(calls) - 1 == bad + (wanted if bad >= 0 and wanted == 0 else 0):
            wrong_b1 = torch.arange(len(output))[:, None] == sample
            output.register_hook(lambda dy: torch.where(wrong_b1, torch.nan, dy))
        return output, loss

    model[0].zero_grad_buffer()
    optimizer.zero_grad()
    handle.step(
        get_forward_backward_func(), data_iterator=general, model=model[0],
        forward_step_func=forward_step, num_microbatches=2, seq_length=_data.LENGTH,
        micro_batch_size=_samples.SAMPLES, forward_only=False, target_data_iterator=target,
        num_target_microbatches=wanted, target_micro_batch_size=_samples.SAMPLES,
    )  # fmt: skip
    optimizer.step()


def samples(initial: Parameters, wrong: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """On a rank: as `without`, for sample rows; the bad sample is rank 1's."""
    _megatron.initialize(DP2)
    found = {}
    for name, (microbatch, sample) in wrong.items():
        case, states = SAMPLES[name], []
        for steps in ((0, 1, 2), (0, 2)):
            one = Trained(
                DP2, DRConfig(rows="sample", on_bad_gradient="skip", **vars(case)), initial
            )
            run = one.handle, one.model, one.optimizer
            for step in steps:
                if name == "refresh":
                    one.handle.steps = 2 * step  # each step is due for a target
                here = parallel_state.get_data_parallel_rank() == 1 and step == WRONG
                print(f"case {name}:", flush=True)
                sample_step(run, case, step, microbatch if here else -1, sample)
                if step == WRONG:
                    due = one.handle.rows.path.targets.known
                    counts = {k: float(v) for k, v in one.handle.metrics.items() if "bad" in k}
            states.append(one.state())
        found[name] = states, counts, due
    return found


def test_sample_rows_leave_a_step_out(capfd: pytest.CaptureFixture[str]) -> None:
    wrong = {"streaming": (2, 1), "step": (3, 2), "refresh": (0, 1)}
    for found in run_ranks(2, samples, _oracle.initial(DP2), wrong, timeout=400):
        for name, ((one, other), counts, known) in found.items():
            assert one == other, name
            target = wrong[name][0] < 2
            assert counts == {"dr bad target": target, "dr bad general": not target}, name
            assert known == (not target), name  # a bad target is never used again
    said = re.findall(r"step \d: look at (.*)", capfd.readouterr().out)
    assert "general microbatch 1 of data-parallel rank 1 (rank 1), sample 2" in said
    assert "target microbatch 0 of data-parallel rank 1 (rank 1)" in said


def test_what_can_not_be_had_is_refused() -> None:
    with pytest.raises(ValueError, match="needs rows in gradient buffers"):
        DRConfig(rows="sample", on_bad_gradient="mean")

    def refused() -> list[str]:
        _megatron.initialize(Layout())
        sentences = []
        for change in ("check", "optimizer"):
            model, optimizer, config = _megatron.build(Layout())
            model[0].ddp_config.check_for_nan_in_grad = change == "check"
            optimizer = None if change == "optimizer" else optimizer
            dr = DRConfig(rows="rank", on_bad_gradient="skip")
            with pytest.raises(ValueError) as error:
                megatron_dr.attach(model, optimizer, config, dr)
            sentences.append(str(error.value))
        return sentences

    check, optimizer = run_ranks(1, refused)[0]
    assert "--no-check-for-nan-in-loss-and-grad" in check and "optimizer" in optimizer


def launch(argv: list[str]) -> tuple[int, str, str]:
    """On a rank: the entry, with a NaN in a loss of the third step on rank 1."""
    calls, stock = [0], forward.loss_func

    def loss_func(*args: Any) -> Any:
        calls[0] += 1
        total, *rest = stock(*args)
        wrong = parallel_state.get_data_parallel_rank() == 1 and calls[0] == 2 * (2 + 4) + 1
        return (total * math.nan if wrong else total, *rest)

    forward.loss_func = loss_func
    return _train.launch(argv)


def origins_of(kept: Path) -> list[str]:
    (line,) = metrics.read(kept, "bad gradient")
    assert len(line["from"]) == 1
    return list(line["from"])


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_in_megatrons_loop(policy: str, data: dict[str, str], tmp_path: Path) -> None:
    kept = tmp_path / "metrics.jsonl"
    more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-slots 2
        --dr-metrics {kept} --dr-on-bad-gradient {policy} --eval-iters 0
        {"--no-check-for-nan-in-loss-and-grad" if policy == "stop" else ""}"""
    ranks = run_ranks(2, launch, _train.flags(data, more, 4), timeout=400)
    code, out, error = ranks[0]
    assert all(re.fullmatch(rf"{data['target']}:[1-6]", place) for place in origins_of(kept))
    lines = metrics.read(kept, "bad gradient")
    assert [(line["iteration"], line["role"], line["data rank"], line["microbatch"])
            for line in lines] == [(3, "target", 1, 0)]  # fmt: skip
    if policy == "stop":
        assert [found[0] for found in ranks] == [1, 1]
        assert "error: step 2: the gradient of the target has NaN or Inf" in error
        return
    assert code == 0, error
    skipped = re.findall(r"iteration +(\d)/.*number of skipped iterations: +(\d)", ranks[1][1])
    assert skipped == [("1", "0"), ("2", "0"), ("3", "1"), ("4", "0")]
    steps = metrics.read(kept, "train")
    assert [line["dr bad target"] for line in steps] == [0, 0, 1, 0]
    assert math.isfinite(steps[3]["lm loss"]) and "update is not applied" in out
