"""What a rank of a real run sends and keeps, counted, beside what the plan says."""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch.utils._python_dispatch import TorchDispatchMode

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.attach import attached
from megatron_dr.mcore.buffer_rows import exchange
from megatron_dr.mcore.buffer_rows.exact_gram import ExactGram
from megatron_dr.mcore.buffer_rows.sketched_gram import SketchedGram
from megatron_dr.plan import activations, memory, wire
from megatron_dr.plan.activations import Kept, Shape
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.layout import Layout, Place
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.wire import Send

from . import _data, _megatron, _saved
from ._ranks import run_ranks

# Which argument of torch's collectives is the payload, and how it travels.
KINDS: dict[str, tuple[int, str]] = {
    "allreduce_": (0, "reduce"), "allreduce_coalesced_": (0, "reduce"),
    "_reduce_scatter_base_": (1, "ring"), "reduce_scatter_tensor_coalesced_": (1, "ring"),
    "_allgather_base_": (0, "ring"), "allgather_into_tensor_coalesced_": (0, "ring"),
    "alltoall_base_": (1, "exchange"),
}  # fmt: skip
# What sends gradients and parameters; all else is activations'.
COUNTED = (
    (_ParamAndGradBucketGroup, "start_grad_sync"), (_ParamAndGradBucketGroup, "start_param_sync"),
    (exchange.Exchange, "_launch"), (exchange.Exchange, "_land"), (ExactGram, "gram"),
    (SketchedGram, "gram"), (ExactGram, "_finish"), (_megatron, "finalize_model_grads"),
)  # fmt: skip


class Recorder(TorchDispatchMode):
    """Sends of gradients and parameters; the most bytes that travelling ranges hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = self.travelling = False
        self.sends: list[Send] = []
        self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name != "broadcast_":  # of token counts
                payload, kind = KINDS[name]
                self._sent(kind, args[payload], next(a for a in args if _is_group(a)))
        elif self.travelling and torch.is_tensor(out):
            known = {a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)}
            if out.untyped_storage().data_ptr() not in known:
                self._holds(out.nbytes)
                weakref.finalize(out, self._holds, -out.nbytes)
        return out

    def _sent(self, kind: Any, tensors: Any, group: Any) -> None:
        tensors = [tensors] if torch.is_tensor(tensors) else tensors
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        self.sends.append(Send("", kind, sum(t.nbytes for t in tensors), tuple(ranks)))

    def _holds(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.most = max(self.most, self.held)

    def watch(self) -> None:
        """In this process, for good."""
        for owner, name in COUNTED:
            setattr(owner, name, self._counted(getattr(owner, name)))
        exchange._steps = self._tracked(exchange._steps)

    def _counted(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return stock(*args, **kwargs)
            self.inside = True
            try:
                with self:  # not around the whole step: it would slow all of the model's operations
                    return stock(*args, **kwargs)
            finally:
                self.inside = False

        return counted

    def _tracked(self, stock: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def tracked(*args: Any) -> Iterator[Any]:
            steps = stock(*args)
            while True:
                self.travelling = True
                try:
                    handle = [next(steps)]
                except StopIteration:
                    return
                finally:
                    self.travelling = False
                yield handle.pop()  # it holds what travels: not kept here
                time.sleep(0.002)  # gloo's thread lets go of what it has sent

        return tracked


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject)


@dataclass
class Counted:
    """Of one rank and step."""

    stage: int
    sends: list[Send]
    memory: dict[str, int]


def count(recorder: Recorder, layout: _data.Layout, dr: DRConfig | None) -> Counted:
    """Train two steps; what the second sends, and what is kept."""
    marks: list[int] = []

    def plugin(model: Any, optimizer: Any, config: Any) -> Any:
        handle = None if dr is None else megatron_dr.attach(model, optimizer, config, dr)
        stock = optimizer.step

        def stepped() -> Any:
            result = stock()
            marks.append(len(recorder.sends))
            return result

        optimizer.step = stepped
        return handle

    saved = _saved.Saved()
    model, optimizer, _, _ = _saved.train(layout, 2, saved, plugin)
    found = _kept(model, optimizer) | {"activations": saved.most}
    if dr is not None:
        rows = attached(model).rows.buffers
        extra = {row: sum(f.nbytes for f in flats) for row, flats in rows._extra.items()}
        slots = sum(size for row, size in extra.items() if row < rows.row_map.slots)
        found |= {"slots": slots, "target": sum(extra.values()) - slots + recorder.most}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    return Counted(stage, recorder.sends[marks[0] : marks[1]], found)


def _kept(model: list[Any], optimizer: Any) -> dict[str, int]:
    """Bytes that live between steps, each storage once."""
    weights = _storages(p for chunk in model for p in chunk.parameters())
    buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    gradients = _storages(b.grad_data for b in buffers)
    own: dict[int, int] = {}
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = each.optimizer
        main = [p for group in adam.param_groups for p in group["params"]]
        own |= _storages([*main, *(p.grad for p in main if p.grad is not None)])
        own |= _storages(v for state in adam.state.values() for v in state.values())
    own = {key: size for key, size in own.items() if key not in weights | gradients}
    parts = {"weights": weights, "gradients": gradients, "optimizer": own}
    return {name: sum(sizes.values()) for name, sizes in parts.items()}


def _storages(tensors: Any) -> dict[int, int]:
    found = [t.untyped_storage() for t in tensors if torch.is_tensor(t)]
    return {s.data_ptr(): s.nbytes() for s in found}


# -- the plan of the same ------------------------------------------------------------------------
def planned(layout: _data.Layout, dr: DRConfig | None) -> tuple[Model, Layout, Rows]:
    """Of `_megatron.transformer_config`'s model."""
    moe, norm = layout.moe, layout.layer_norm
    model = Model(
        layers=4, hidden=32, heads=4, groups=2, ffn=48, vocabulary=64, multiple=1,
        tied=layout.tied, gated=not norm, biases=norm, norm_bias=norm, qk_norm=layout.qk_layernorm,
        experts=4 if moe else 0, expert_ffn=24 if moe else 0, active=2 if moe else 0,
    )  # fmt: skip
    same = ("dp", "tp", "pp", "cp", "ep", "sequence_parallel", "distributed_optimizer", "overlap")
    own = Layout(
        **{name: getattr(layout, name) for name in same}, vpp=layout.vpp or 1,
        etp=layout.etp if moe else layout.tp, overlap_gather=layout.overlap_param_gather,
        weight_bytes=2 if layout.bf16 else 4, gradient_bytes=2 if layout.bf16_buffers else 4,
        bucket=5000,
    )  # fmt: skip
    dr = dr or DRConfig()
    least = max(layout.cp, layout.ep * own.etp // layout.tp, 1)
    rows = Rows(
        slots=dr.num_slots, ranks=dr.row_ranks or least, target_ranks=dr.target_ranks,
        halves=dr.alpha_style == "auto", exact=dr.gram == "exact", sketch=dr.sketch_size or 0,
        slot_bytes=2 if dr.slot_dtype == "bf16" else 4,
    )  # fmt: skip
    return model, own, rows


Figures = dict[str, tuple[float, float]]  # what: counted, planned


def compare(ranks: list[tuple[Counted, Counted]], layout: _data.Layout, dr: DRConfig) -> Figures:
    """Means over the ranks of each stage: bytes by level, of nodes of two GPUs and of the row
    groups, and memory by part.

    Args:
        ranks: of each rank a plain run and one of ours.
    """
    model, own, rows = planned(layout, dr)
    places: dict[str, Place] = {"nodes": lambda r: r // 2, "rows": rows.place(own)}
    out: Figures = {}
    for stage in stages(model, own):
        here = [pair for pair in ranks if pair[0].stage == stage.number]
        mean = lambda values: sum(values) / len(here)  # noqa: B023, E731
        for number, (arm, plan) in enumerate(
            {"plain": wire.plain(stage), "ours": wire.ours(stage, rows)}.items()
        ):
            for level, place in places.items():
                each = [wire.by_level(pair[number].sends, place) for pair in here]
                said = wire.by_level(plan, place)
                for side, which in enumerate(("inside", "between")):
                    found = mean(levels[side] for levels in each)
                    out[f"{arm} stage {stage.number} {which} {level}"] = found, said[side]
        kept = memory.plain(stage) | memory.ours(stage, rows)
        kept["target"] += kept["in flight"]
        run = Kept(Shape(1, _data.LENGTH), fused=False)
        number = layout.num_general + layout.num_target
        kept["activations"] = sum(activations.of_stage(stage, run, number, False).values())
        for part in here[0][1].memory:
            if part == "activations" and layout.moe:
                continue  # the router does not deal tokens out evenly
            each = [pair[1].memory[part] for pair in here]
            # shards are uneven, flights are not, but a gloo thread may let go of one late
            found = min(each) if part == "target" else mean(each)
            out[f"stage {stage.number} {part}"] = found, kept[part]
    return out


# -- of several layouts --------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """A layout and what the plugin does in it.

    Attributes:
        piece: elements that travel at a time; 0: as many as in a large model.
    """

    layout: _data.Layout
    dr: DRConfig
    piece: int = 0


def measured(cases: dict[str, Case]) -> Iterator[tuple[str, Figures]]:
    """By case. Each run has processes of its own: gloo keeps threads for every group."""
    for name, case in cases.items():
        plain, ours = (
            run_ranks(case.layout.world, _run, case, dr, timeout=300) for dr in (None, case.dr)
        )
        with _in_pieces(case.piece):
            yield name, compare(list(zip(plain, ours, strict=True)), case.layout, case.dr)


def _run(case: Case, dr: DRConfig | None) -> Counted:
    """On a rank."""
    recorder = Recorder()
    recorder.watch()
    with _in_pieces(case.piece):
        return count(recorder, case.layout, dr)


@contextmanager
def _in_pieces(size: int) -> Iterator[None]:
    """Small models in pieces, as large ones travel: in runs and in the plan."""
    if not size:
        yield
        return
    with (
        mock.patch.multiple(exchange, _CHUNK=size, _BUCKET=size),
        mock.patch.multiple(memory, CHUNK=size, BUCKET=size),
    ):
        yield
