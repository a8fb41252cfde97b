"""Seconds of a whole step: computation, pipeline bubble, collectives of activations, what is left
of the gradients' (`timeline.py`), and the optimizer.

    step = (m + (pp - 1) / vpp) times the slowest stage's forward and backward of a microbatch
           + exposed + optimizer

m: microbatches of a rank, the target's among them; so a step of plain Megatron has fewer. Products
run at the rate that the hardware sustains; all else of a layer is in that rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dr.plan import flops, tensor, timeline, wire
from megatron_dr.plan.activations import Kept
from megatron_dr.plan.buffers import Stage, stages
from megatron_dr.plan.flops import Tokens
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.memory import owned
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows
from megatron_dr.plan.timeline import Batch
from megatron_dr.plan.wire import Send


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        kept: a microbatch, and how it is run.
        general, target: microbatches of a rank and step, of a rank that runs them.
        rows: of the plugin; None: it is off.
        sample: tokens of a sample that is packed; 0: one fills a sequence.
    """

    model: Model
    layout: Layout
    kept: Kept
    general: int
    target: int = 0
    rows: Rows | None = None
    sample: float = 0.0

    @property
    def microbatches(self) -> int:
        """That a rank runs."""
        if self.rows is not None and self.rows.target_ranks:
            return max(self.general, self.target)
        return self.general + self.target

    @property
    def tokens(self) -> Tokens:
        """Of a microbatch, over all context-parallel ranks."""
        shape = self.kept.shape
        return flops.of_sequences(shape.sequences, shape.length, self.sample)

    def operations(self) -> dict[str, float]:
        """Of all ranks' steps: general and target batch, and what is recomputed of both."""
        each = self.tokens
        whole, again = (
            3 * flops.forward(self.model, self.layout, each),
            flops.again(self.model, self.layout, self.kept.recompute, each),
        )
        targets = self.rows.target_ranks if self.rows is not None else 0
        general = self.general * (self.layout.dp - targets)
        target = self.target * (targets or self.layout.dp)
        return {
            "general": general * whole,
            "target": target * whole,
            "recomputed": (general + target) * again,
        }


def seconds(run: Run, hardware: Hardware) -> dict[str, float]:
    """Of a step, by part."""
    if not hardware.overlaps:
        in_turn = replace(run.layout, overlap=False, overlap_gather=False)
        run = replace(run, layout=in_turn)
    layout = run.layout
    held = stages(run.model, layout)
    parts = [_of_microbatch(stage, run, hardware) for stage in held]
    slowest = max(parts, key=lambda part: sum(part.values()))
    out = {name: run.microbatches * value for name, value in slowest.items()}
    hop = _hop(run, hardware)
    filling = (layout.pp - 1) / layout.vpp * sum(slowest.values())
    out["bubble"] = filling + (2 * (layout.pp - 1) * hop if layout.pp > 1 else 0.0)
    batch = Batch(run.kept.shape.tokens, run.general)
    out |= timeline.exposed(run.model, layout, hardware, batch, run.rows)
    return out | _optimizer(held, hardware)


def _of_microbatch(stage: Stage, run: Run, hardware: Hardware) -> dict[str, float]:
    """Forward and backward of one microbatch on a stage."""
    model, layout, recompute = run.model, run.layout, run.kept.recompute
    layers = layout.layers_of_a_chunk(model.layers) * layout.vpp
    ranks = layout.tp * layout.cp
    computed = 3 * layers * flops.layer(model, run.tokens)
    computed += flops.again(model, layout, recompute, run.tokens) * layers / model.layers
    if stage.number == layout.pp - 1:
        computed += 3 * flops.head(model, layout, run.tokens)
    full = 1.5 if recompute.granularity == "full" else 1.0
    own = {
        "tensor parallel": tensor.seconds(stage, run.kept, hardware),
        "experts": full * layers * hardware.alone(_experts(stage, run)),
        "context": full * layers * _context(stage, run, hardware),
    }
    return {"computation": computed / ranks / hardware.flops, **own}


def _experts(stage: Stage, run: Run) -> list[Send]:
    """To the experts and back, twice."""
    model, layout = run.model, run.layout
    if not model.experts or layout.ep == 1:
        return []
    tokens = run.kept.shape.tokens / layout.cp / layout.tp
    payload = tokens * model.active * model.hidden * layout.weight_bytes
    first = stage.number * layout.tp * layout.data
    group = tuple(range(first, first + layout.ep * layout.etp, layout.etp))
    return [Send("experts", "exchange", payload, group)] * 4


def _context(stage: Stage, run: Run, hardware: Hardware) -> float:
    """Keys and values go round while attention computes: what is longer than that is exposed."""
    model, layout = run.model, run.layout
    if layout.cp == 1:
        return 0.0
    key = run.kept.shape.tokens * max(1.0, model.groups / layout.tp) * model.head_size
    first = stage.number * layout.tp * layout.data
    group = tuple(range(first, first + layout.tp * layout.cp, layout.tp))
    sends = [Send("context", "ring", 2 * key * layout.weight_bytes, group)] * 3
    beside = 3 * flops.attention(model, run.tokens) / layout.tp / layout.cp / hardware.flops
    return max(0.0, hardware.alone(sends) - (beside if hardware.overlaps else 0.0))


def _hop(run: Run, hardware: Hardware) -> float:
    """From one stage to the next."""
    layout = run.layout
    split = layout.cp * (layout.tp if layout.sequence_parallel else 1)
    payload = run.kept.shape.tokens / split * run.model.hidden * layout.weight_bytes
    apart = layout.tp * layout.data >= hardware.node
    link = hardware.between if apart else hardware.inside
    return payload / link.bandwidth + link.latency


def _optimizer(held: Sequence[Stage], hardware: Hardware) -> dict[str, float]:
    """Adam reads and writes the fp32 weight and both moments, reads the gradient, and writes the
    weight; buffers are zeroed. Without overlap the parameters are gathered then."""
    layout = held[0].layout
    moved = max(
        owned(stage) * (24 + layout.gradient_bytes + layout.weight_bytes)
        + sum(b.numel for b in stage.buffers) * layout.gradient_bytes
        for stage in held
    )
    gathers = [
        hardware.alone([send for send in wire.plain(stage) if send.part == "parameters"])
        for stage in held
    ]
    hidden = layout.overlap_gather
    return {
        "optimizer": moved / hardware.memory_bandwidth,
        "parameters": 0.0 if hidden else max(gathers),
    }
