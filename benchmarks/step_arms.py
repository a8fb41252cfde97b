"""The arms of `step.py`, run on gloo ranks: Megatron's model with the plugin or without it.

Every arm has a GPTModel, DDP buffers and a distributed optimizer of its own, all alive at once in
the same ranks, so that steps of different arms can alternate.

What is measured, and how:
    time      of a step, from zeroing the gradients to the optimizer's end, on the slowest rank; all
              arms step once per repetition, in an order that is drawn anew for each. CPU time of
              all threads of the busiest rank beside it: other work on the machine is not in it, nor
              is waiting for the other ranks
    wire      bytes that a rank sends in a step: every collective passes torch's dispatcher, where
              a mode sees its tensors and its group (`sent.py`), on the rank that sends most
    memory    most bytes that a rank's tensors hold at once: those that live between steps (the
              parameters, buffers, optimizer state), and what a step holds beyond them at its peak,
              as torch's CPU allocator tells the profiler; Python, gloo's own buffers and what the
              allocator wastes are not in it; on the rank that holds most
"""

import contextlib
import gc
import io
import logging
import os
import pickle
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import track
from sent import Sent
from torch.profiler import ProfilerActivity, profile

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore import cpu

cpu.enable()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dr.mcore.cpu.layers import layer_spec  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """Of the model and of a step on one rank."""

    layers: int
    hidden: int
    vocabulary: int
    sequence: int
    micro_batch: int
    general: int
    target: int
    bucket: int  # parameters of a bucket that is reduced in the backward; 0: nothing overlaps
    node: int  # neighbouring ranks of a node, for what is sent between nodes


@dataclass(frozen=True)
class Arm:
    """Microbatches of a rank in a step, and the plugin's configuration; None is plain Megatron."""

    general: int
    target: int
    dr: DRConfig | None

    @property
    def run(self) -> int:
        """Microbatches that a rank computes. With target ranks a rank has one role."""
        one_role = self.dr is not None and self.dr.target_ranks
        return self.general if one_role else self.general + self.target


@dataclass
class Measured:
    """Of one arm on one rank.

    Attributes:
        wire_bytes, between_bytes, early_bytes: sent in a step; of that, to other nodes; and before
            the last backward ended.
        step_ms, cpu_ms: by repetition; of the clock, and of all the rank's threads.
        laps_ms: part of the projection -> by repetition.
    """

    peak_bytes: int = 0
    wire_bytes: int = 0
    between_bytes: int = 0
    early_bytes: int = 0
    gradient_bytes: int = 0
    step_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    laps_ms: dict[str, list[float]] = field(default_factory=dict)


class Model:
    """An arm's model, optimizer and, with the plugin, handle."""

    def __init__(self, arm: Arm, sizes: Sizes) -> None:
        self.arm, self.sizes = arm, sizes
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
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True,
            overlap_grad_reduce=sizes.bucket > 0, bucket_size=sizes.bucket or None,
        )  # fmt: skip
        self.chunks = [DistributedDataParallel(self.config, ddp, model)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-4, use_distributed_optimizer=True), self.chunks
        )
        self.config.finalize_model_grads_func = self._finalize
        self.backward_over: Callable[[], None] = lambda: None
        self.config.no_sync_func = self.chunks[0].no_sync
        self.handle: Any = None
        if arm.dr is not None:
            with contextlib.redirect_stdout(io.StringIO()):  # what it keeps and sends, in words
                self.handle = megatron_dr.attach(self.chunks, self.optimizer, self.config, arm.dr)
            self._watch(self.handle.rows)
        self.general, self.target = self._batches(1), self._batches(2)

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        self.backward_over()
        finalize_model_grads(*args, **kwargs)

    def _watch(self, rows: Any) -> None:
        """The plugin's own finalize comes before Megatron's."""
        stock = rows.source.gram

        def gram(*args: Any) -> Any:
            self.backward_over()
            return stock(*args)

        rows.source.gram = gram

    def _batches(self, seed: int) -> Iterator[dict[str, torch.Tensor]]:
        """Random tokens, the same in every arm."""
        generator = torch.Generator().manual_seed(seed + 1000 * dist.get_rank())
        shape = (self.sizes.micro_batch, self.sizes.sequence + 1)
        while True:
            text = torch.randint(0, self.sizes.vocabulary, shape, generator=generator)
            yield {"tokens": text[:, :-1], "labels": text[:, 1:]}

    @property
    def gradient_bytes(self) -> int:
        return sum(buffer.grad_data.nbytes for buffer in self.chunks[0].buffers)

    def step(self) -> None:
        """One training step."""
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        schedule: dict[str, Any] = {
            "forward_step_func": self._forward,
            "data_iterator": self.general,
            "model": self.chunks,
            "num_microbatches": self.arm.general,
            "seq_length": self.sizes.sequence,
            "micro_batch_size": self.sizes.micro_batch,
            "forward_only": False,
        }
        if self.handle is None:
            get_forward_backward_func()(**schedule)
        else:
            self.handle.step(
                get_forward_backward_func(), target_data_iterator=self.target,
                num_target_microbatches=self.arm.target, **schedule,
            )  # fmt: skip
        self.optimizer.step()

    def _forward(self, data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(data)
        positions = torch.arange(self.sizes.sequence)[None]
        return model(batch["tokens"], positions, None, labels=batch["labels"]), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    total, count = output.sum(), torch.tensor(output.numel(), dtype=torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def _held() -> int:
    """Bytes of all live tensors, each storage once."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _transient(step: Any) -> int:
    """Most bytes that a step holds at once beyond what was there before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _prepare(arm: Arm, sizes: Sizes) -> tuple[Model, Measured]:
    """Build an arm and measure what does not depend on the clock; its steps are then warm."""
    gc.collect()
    before = _held()
    model = Model(arm, sizes)
    model.step()  # makes the optimizer's state and the target's buffer
    model.step()  # Megatron overlaps from the second step on
    with Sent(sizes.node) as sent:
        model.backward_over = sent.backward_over
        first = _transient(model.step)
    model.backward_over = lambda: None
    # gloo may free its scratch in a thread that the profiler does not see: the lesser of two
    transient = min(first, _transient(model.step))
    gc.collect()
    return model, Measured(
        _held() - before + transient, sent.bytes, int(sent.between), sent.early,
        model.gradient_bytes,
    )  # fmt: skip


def _repeat(models: dict[str, Model], found: dict[str, Measured], order: list[str]) -> None:
    """Every arm once, in this order."""
    for name in order:
        model = models[name]
        gc.collect()
        dist.barrier()
        clock, cpu_time = time.perf_counter(), time.process_time()
        model.step()
        found[name].step_ms.append((time.perf_counter() - clock) * 1e3)
        found[name].cpu_ms.append((time.process_time() - cpu_time) * 1e3)
        for key, value in (model.handle.metrics if model.handle else {}).items():
            if key.endswith(" ms"):
                part = key.removeprefix("dr ").removesuffix(" ms")
                found[name].laps_ms.setdefault(part, []).append(float(value))


def work(
    rank: int, world: int, folder: str, arms: dict[str, Arm], sizes: Sizes, repetitions: int
) -> None:
    """A rank: measures every arm and writes what it found to `folder`."""
    warnings.simplefilter("ignore", FutureWarning)  # torch renames its collectives
    logging.disable(logging.WARNING)  # Megatron's notes on every model
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    def shown(values: Iterable[Any], description: str) -> Iterable[Any]:
        return track(values, description, transient=True) if rank == 0 else values

    models, found = {}, {}
    for name, arm in shown(list(arms.items()), "building, wire and memory"):
        models[name], found[name] = _prepare(arm, sizes)
    for repetition in shown(range(repetitions), "timing"):
        names = list(models)
        random.Random(repetition).shuffle(names)  # the same on every rank
        _repeat(models, found, names)
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()
