"""The arms of `layer_path.py`, run in one process: a Megatron model that steps in many ways.

Every arm has a GPTModel, DDP buffers and an optimizer of its own, all alive at once, so that steps
of different arms can alternate. What is measured, and how:
    time      of a step, from zeroing the gradients to the optimizer's end, and of its parts; all
              arms step once per repetition, in an order that is drawn anew for each. CPU time of
              the process beside it: other work on the machine is not in it
    parts     forward (loss included), scoring (from a layer's X and dY to its samples' weights),
              weight gradient (choosing, scaling and the GEMM), optimizer; the rest is backward.
              Plain Megatron's weight gradient can't be clocked without changing it: its share of a
              step is that of its GEMMs over tokens in a profiled step
    memory    most bytes that tensors hold at once: those that live between steps, and what a step
              holds beyond them at its peak, as torch's CPU allocator tells the profiler
"""

import contextlib
import ctypes
import functools
import gc
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import cpu

cpu.enable()

from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dr.mcore.cpu.layers import layer_spec  # noqa: E402
from megatron_dr.mcore.layer_rows.deferred import Deferred, Replay  # noqa: E402
from megatron_dr.mcore.layer_rows.immediate import Immediate  # noqa: E402
from megatron_dr.mcore.layer_rows.path import SamplePath  # noqa: E402
from megatron_dr.mcore.layer_rows.taps import linear  # noqa: E402
from megatron_dr.mcore.layer_rows.targets import Targets  # noqa: E402

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's mallopt
SCORING, WEIGHT_GRADIENT = "scoring", "weight gradient"
PARTS = ("forward", "backward", SCORING, WEIGHT_GRADIENT, "optimizer")


def keep_freed_memory() -> None:
    """No memory maps, no trimming: see the module."""
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)


@dataclass(frozen=True)
class Sizes:
    """Of the model, and the general samples of a step."""

    layers: int
    hidden: int
    vocabulary: int
    sequence: int
    samples: int


@dataclass(frozen=True)
class Arm:
    """What a step sees, and the plugin's configuration; None is plain Megatron.

    Attributes:
        targets: target samples of a step. Plain Megatron takes them for further general ones.
        microbatches: that the general samples come in.
    """

    targets: int
    dr: DRConfig | None
    microbatches: int = 1


@dataclass
class Measured:
    """Of one arm.

    Attributes:
        step_ms, cpu_ms: by repetition; of the clock, and of all threads.
        parts_ms: part of the step -> by repetition.
        gemm_share: of the profiled step: GEMMs over tokens.
    """

    peak_bytes: int = 0
    gemm_share: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    parts_ms: dict[str, list[float]] = field(default_factory=dict)


class Clock:
    """Milliseconds by part; what runs inside another part counts for the inner one alone."""

    def __init__(self) -> None:
        self.ms: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._lap()
        self._open.append(name)
        try:
            yield
        finally:
            self._lap()
            self._open.pop()

    def _lap(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.ms[self._open[-1]] += 1e3 * (now - self._since)
        self._since = now

    def around(self, owner: Any, name: str, part: str) -> None:
        """Clock a function of a class or a module from now on."""
        stock: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(stock)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return stock(*args, **kwargs)

        setattr(owner, name, clocked)


CLOCK = Clock()
for _owner, _name in ((Immediate, "coefficients"), (Deferred, "coefficients"), (Deferred, "solve"),
                      (Targets, "add"), (Targets, "reduce")):  # fmt: skip
    CLOCK.around(_owner, _name, SCORING)
for _owner, _name in ((SamplePath, "linear"), (SamplePath, "vector"), (SamplePath, "embedding"),
                      (linear, "_weight_gradient"), (Deferred, "write"),
                      (Replay, "coefficients")):  # fmt: skip
    CLOCK.around(_owner, _name, WEIGHT_GRADIENT)


class Model:
    """An arm's model, optimizer and, with the plugin, handle."""

    def __init__(self, arm: Arm, sizes: Sizes) -> None:
        self.arm, self.sizes, self.handle = arm, sizes, None
        self.config = TransformerConfig(
            num_layers=sizes.layers, hidden_size=sizes.hidden,
            num_attention_heads=max(1, sizes.hidden // 64), normalization="RMSNorm",
            add_bias_linear=False, use_cpu_initialization=True, persist_layer_norm=False,
            gradient_accumulation_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
            bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        )  # fmt: skip
        model = GPTModel(
            self.config, layer_spec(self.config), sizes.vocabulary, sizes.sequence,
            position_embedding_type="rope",
        )  # fmt: skip
        model.model_type = ModelType.encoder_or_decoder
        self.chunks = [DistributedDataParallel(self.config, DistributedDataParallelConfig(), model)]
        self.optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-4), self.chunks)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.general_size, self._target_size = sizes.samples // arm.microbatches, arm.targets
        if arm.dr is None:
            self.general_size += arm.targets // arm.microbatches
        else:
            self.handle = megatron_dr.attach(self.chunks, self.optimizer, self.config, arm.dr)
        self._general = self._batches(1, self.general_size)
        self._target = self._batches(2, self._target_size)
        self._steps = 0

    def _batches(self, seed: int, samples: int) -> Iterator[dict[str, torch.Tensor]]:
        """Random tokens, the same in every arm."""
        generator, length = torch.Generator().manual_seed(seed), self.sizes.sequence
        fixed = {"position_ids": torch.arange(length).expand(samples, -1),
                 "loss_mask": torch.ones(samples, length)}  # fmt: skip
        shape = (samples, length + 1)
        while True:
            text = torch.randint(0, self.sizes.vocabulary, shape, generator=generator)
            yield {"tokens": text[:, :-1], "labels": text[:, 1:], **fixed}

    @property
    def period(self) -> int:
        """Steps after which a step is as before."""
        return self.arm.dr.target_refresh if self.arm.dr else 1

    def step(self) -> None:
        """One training step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule: dict[str, Any] = {
            "forward_step_func": self._forward, "data_iterator": self._general,
            "model": self.chunks, "num_microbatches": self.arm.microbatches,
            "seq_length": self.sizes.sequence, "micro_batch_size": self.general_size,
            "forward_only": False,
        }  # fmt: skip
        if self.handle is None:
            get_forward_backward_func()(**schedule)
        else:
            dr = self.handle.dr
            targets = self.arm.microbatches if dr.target_pass == "merged" else 1
            self.handle.step(
                get_forward_backward_func(), target_data_iterator=self._target,
                num_target_microbatches=targets if self._steps % dr.target_refresh == 0 else 0,
                target_micro_batch_size=self._target_size, **schedule,
            )  # fmt: skip
        with CLOCK.part("optimizer"):
            self.optimizer.step()
        self._steps += 1

    def _forward(self, data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        with CLOCK.part("forward"):
            batch = next(data)
            output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return output, partial(_loss, batch["loss_mask"])


def _loss(
    mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, count = (output * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def _held() -> int:
    """Bytes of all live tensors, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _transient(profiler: Any) -> int:
    """Most bytes that a step held at once beyond what was there before it."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _gemm_share(profiler: Any, tokens: int) -> float:
    """Of a plain step: the GEMMs whose inner dimension is the tokens."""
    events = profiler.events()
    total = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    gemms = [e for e in events if e.name == "aten::mm" and e.input_shapes[0][-1:] == [tokens]]
    return float(sum(e.time_range.elapsed_us() for e in gemms) / total)


def prepare(arm: Arm, sizes: Sizes) -> tuple[Model, Measured]:
    """Build an arm and measure what does not depend on the clock; its steps are then warm."""
    before = _held()
    with contextlib.redirect_stdout(io.StringIO()):  # what it keeps and sends, in words
        model = Model(arm, sizes)
        model.step()  # makes the optimizer's state
    transient, share = 0, 0.0
    for _ in range(model.period):
        gc.collect()
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=arm.dr is None
        ) as profiler:
            model.step()
        transient = max(transient, _transient(profiler))
    if arm.dr is None:
        share = _gemm_share(profiler, model.general_size * sizes.sequence)
    del profiler
    return model, Measured(_held() - before + transient, share)


def repeat(models: dict[str, Model], found: dict[str, Measured], order: list[str]) -> None:
    """Every arm once, in this order; of an arm whose steps differ, the mean of a period."""
    for name in order:
        model, result = models[name], found[name]
        gc.collect()
        CLOCK.ms.clear()
        clock, cpu_time = time.perf_counter(), time.process_time()
        for _ in range(model.period):
            model.step()
        result.cpu_ms.append(1e3 * (time.process_time() - cpu_time) / model.period)
        result.step_ms.append(step_ms := 1e3 * (time.perf_counter() - clock) / model.period)
        parts = {part: CLOCK.ms[part] / model.period for part in PARTS}
        if model.handle is None:
            parts[WEIGHT_GRADIENT] = result.gemm_share * step_ms
        parts["backward"] = step_ms - sum(parts.values())
        for part, ms in parts.items():
            result.parts_ms.setdefault(part, []).append(ms)
