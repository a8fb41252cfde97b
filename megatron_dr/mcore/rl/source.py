"""A run's data and forward step where it trains by rewards: cycles of a rollout and steps on it."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu, parallel_state

from megatron_dr.config.rl import RLConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import Named, by_name
from megatron_dr.data.order import EpochOrder
from megatron_dr.mcore import errors
from megatron_dr.mcore.data.datasets import dataset_config
from megatron_dr.mcore.data.samples import chat_of, note_passed_over
from megatron_dr.mcore.rl import filter_once, saved
from megatron_dr.mcore.rl.collect import Collector, draw
from megatron_dr.mcore.rl.forward import policy_step
from megatron_dr.mcore.rl.offload import Offload
from megatron_dr.mcore.rl.reference_policy import Reference
from megatron_dr.mcore.seams.source import Source, new_folder, resumes
from megatron_dr.mcore.step.handle import Handle
from megatron_dr.rl.experience import Experience, ExperienceStream
from megatron_dr.rl.prompts import Prompt, read_prompts

GENERAL, TARGET = "general", "target"


class RolloutSource(Source):
    """GRPO or PPO with data regularisation.

    A cycle begins with a rollout of general prompts, every `target_refresh` cycles also of target
    prompts, and goes on with `steps_per_cycle` steps of Megatron's loop on them. What a cycle does
    depends on its number alone, so that a resumed run goes on as if it had not stopped.

    Attributes:
        experiences: by role: what is trained on now.
    """

    judged_by = ("target reward", True)

    def __init__(self, args: Namespace, target: TargetConfig, rl: RLConfig) -> None:
        self.args, self.target, self.rl = args, target, rl
        self.forward_step = partial(policy_step, rl)
        self.tokenizer = dataset_config(args).tokenizer
        self.prompts: dict[str, list[Prompt]] = {GENERAL: self._read(args.data_path)}
        held_out = {GENERAL: rl.valid_data, TARGET: _one(target.target_valid_data)}
        self.held_out = {r: self._read([path]) for r, path in held_out.items() if path is not None}
        path = _one(target.target_test_data)
        self.tested = [] if path is None else self._read([path])
        self.tests = bool(self.tested)
        self.experiences: dict[str, Experience] = {}
        self._target: list[ExperienceStream] = []

    def target_samples(self) -> Sequence[Any]:
        """Target prompts; without any, the rollout's own completions."""
        path = _one(self.target.target_data)
        if path is None:
            return range(self.rl.completions)
        self.prompts[TARGET] = self._read([path])
        return self.prompts[TARGET]

    def distinct(self, samples: Sequence[Any]) -> int:
        """Completions: each rollout's are new, though its prompts are not."""
        steps: int = self.args.train_iters
        cycles = -(-steps // self.rl.steps_per_cycle(self.args.global_batch_size))
        if TARGET not in self.prompts:
            return cycles * self.rl.completions
        rollouts = -(-cycles // self.rl.target_refresh)
        return rollouts * self.rl.target_prompts * self.rl.group

    def streams(
        self, samples: Any, micro_batch_size: int, ranks: int, chunks: int
    ) -> list[ExperienceStream]:
        """The target's; what they give is shown to them at each rollout."""
        whole = self.rl.completions if self.target.target_data is None else None
        batch = whole or self.target.target_batch
        plain = not self.rl.target_has_ratio
        self._target = [self._stream(micro_batch_size, batch, plain) for _ in range(chunks)]
        return self._target

    def begin(self, handle: Handle) -> None:
        args, rl, model = self.args, self.rl, handle.model
        self.model, self.steps_per_cycle = model, rl.steps_per_cycle(args.global_batch_size)
        batch = args.global_batch_size
        self._general = [self._stream(args.micro_batch_size, batch, False) for _ in model]
        self._reference = Reference(model) if rl.kl > 0 else None
        self._collector = Collector(model, self.tokenizer, rl, args, self._reference)
        self._offload = Offload(handle, rl.offload)
        self._open()

    def datasets(self, num_samples: list[int], vp_stage: int | None) -> tuple[Any, Any, Any]:
        return repeat({}), repeat({}), None  # every step gets its data from a rollout

    def _open(self) -> None:
        """Go on from a checkpoint's rollouts and reference, or keep a new run's reference."""
        args = self.args
        if resumes(args):
            if self._reference is not None:
                self._reference.load(Path(args.load))
            experiences, state = saved.load(args)
            for role, experience in experiences.items():
                self._show(role, experience)
            if self._collector.estimator is not None:
                self._collector.estimator.kl_weight = state["kl_weight"]
        folder = new_folder(args)
        if self._reference is not None and folder is not None:
            self._reference.save(folder)

    def _read(self, paths: list[str]) -> list[Prompt]:
        for path in paths:
            note_passed_over(path)
        return read_prompts(paths, self.tokenizer, self.args.seq_length, chat_of(self.tokenizer))

    # -- a run's steps ---------------------------------------------------------------------------
    def before_step(
        self, stock: Callable[..., Any], schedule: dict[str, Any], steps: int
    ) -> dict[str, Any]:
        cycle, step = divmod(steps, self.steps_per_cycle)
        is_new = self._number(GENERAL) != cycle
        with self._offload.during(is_new):
            self._collect(cycle)
        if is_new and self.rl.filter == "once":
            self._filter(stock, schedule)
        for stream in self._general:
            stream.consumed = step * self.args.global_batch_size
        iterators = self._general if len(self._general) > 1 else self._general[0]
        return {**schedule, "data_iterator": iterators}

    def logged(self, reports: Any) -> Any:
        for report in reports:
            report.pop("target value loss", None)  # it has none
        return _with_values(reports, self._values())

    def validate(self) -> Any:
        names = {GENERAL: "reward", TARGET: "target reward"}
        return self._rewards({names[role]: (p, role) for role, p in self.held_out.items()})

    def test(self) -> Any:
        return self._rewards({"reward": (self.tested, TARGET)})

    def _rewards(self, asked: dict[str, Any]) -> Any:
        """Reports of greedy completions' rewards, by name, of (prompts, role)."""
        with errors.refused(), self._offload.during(bool(asked)):
            values = {
                name: self._collector.greedy_reward(prompts, role)
                for name, (prompts, role) in asked.items()
            }
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        return _with_values([{}], values) if last else []

    def save(self, iteration: int) -> None:
        """Keep the rollouts for a checkpoint of this iteration; before Megatron writes it."""
        estimator = self._collector.estimator
        state = {} if estimator is None else {"kl_weight": estimator.kl_weight}
        # a target that is the rollout itself is made of it again
        own = {role: e for role, e in self.experiences.items() if role in self.prompts}
        saved.save(self.args, iteration, own, state)

    # -- a cycle ---------------------------------------------------------------------------------
    def _collect(self, cycle: int) -> None:
        """What the cycle trains on, unless it is there already."""
        self._refresh(GENERAL, cycle, by_reward=False, count=self.rl.prompts)
        refresh = cycle // self.rl.target_refresh
        if TARGET in self.prompts:
            self._refresh(TARGET, refresh, self.rl.target_by_reward, self.rl.target_prompts)
        elif self._target and self._number(TARGET) != cycle:
            self._show(TARGET, self._itself())

    def _itself(self) -> Experience:
        """The rollout as its own target."""
        general = self.experiences[GENERAL]
        return general.by_reward() if self.rl.target_by_reward else general

    def _number(self, role: str) -> int | None:
        return self.experiences[role].number if role in self.experiences else None

    def _refresh(self, role: str, number: int, by_reward: bool, count: int) -> None:
        if self._number(role) == number:
            return
        prompts = self.prompts[role]
        order = EpochOrder(len(prompts), draw(self.args.seed, role, 0))
        chosen = [prompts[order[number * count + n]] for n in range(count)]
        with errors.refused():
            self._show(role, self._collector.collect(chosen, number, role, by_reward))
            if role == GENERAL and self._collector.estimator is not None:
                self._collector.estimator.steer(self.experiences[role])

    def _show(self, role: str, experience: Experience) -> None:
        if role == TARGET:
            experience = experience.without_returns()
        self.experiences[role] = experience
        for stream in self._general if role == GENERAL else self._target:
            stream.show(experience, self.args.seed)

    def _filter(self, stock: Callable[..., Any], schedule: dict[str, Any]) -> None:
        """Drop completions of the new rollout for its whole cycle."""
        target = self.experiences.get(TARGET) or self._itself()
        general = self.experiences[GENERAL]
        kept = filter_once.filtered(general, target, self.rl, self.model, stock, schedule)
        self._show(GENERAL, kept)

    def _stream(self, size: int, batch: int, plain: bool) -> ExperienceStream:
        return ExperienceStream(
            micro_batch_size=size, rank=mpu.get_data_parallel_rank(),
            size=self.args.data_parallel_size, batch_size=batch, aggregation=self.rl.aggregation,
            plain=plain,
        )  # fmt: skip

    def _values(self) -> dict[str, float]:
        """Of the present rollouts, for the log."""
        values = dict(self.experiences[GENERAL].statistics)
        if TARGET in self.prompts:
            about = self.experiences[TARGET].statistics
            values.update({f"target {name}": value for name, value in about.items()})
        return values


def _with_values(reports: Any, values: dict[str, float]) -> Any:
    """Values that all ranks know, as pairs (sum, count) that Megatron adds up over ranks."""
    for number, report in enumerate(reports):
        for name, value in values.items():
            pair = [value, 1.0] if number == 0 else [0.0, 0.0]
            report[name] = torch.tensor(pair, device=torch.cuda.current_device())
    return reports


def _one(path: Named[str] | None) -> str | None:
    """Of a flag whose names `RLPart` has refused."""
    return next(iter(by_name(path).values()), None)
