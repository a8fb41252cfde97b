"""What a rank keeps of its forwards for their backwards, in bytes.

Megatron's own estimate (`training/theoretical_memory_usage.py`) is the 18 + 4 f/h bytes a token and
hidden element of arXiv:2205.05198: of the first stage alone, with as many key heads as query heads,
no context parallelism, a GELU, and recomputed attention. Here every tensor that a layer saves is
named; `tests/mcore/test_activations.py` counts them.

Legend: T tokens of a microbatch on this rank, S of them where sequence parallelism splits them.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.model import Model


@dataclass(frozen=True)
class Shape:
    """A microbatch: sequences of so many tokens (over all context-parallel ranks)."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


@dataclass(frozen=True)
class Recompute:
    """Megatron's --recompute-*.

    Attributes:
        granularity: none, `selective` (these modules) or `full` (these layers).
        modules: `core_attn`, `mlp`, `moe`: what selective recomputes.
        block: the first `layers` of each chunk are recomputed; else all, so many at a time.
        distribute: what is kept for it is split over tensor ranks.
    """

    granularity: Literal["none", "selective", "full"] = "none"
    modules: tuple[str, ...] = ("core_attn",)
    layers: int = 1
    block: bool = False
    distribute: bool = False

    def has(self, module: str) -> bool:
        return self.granularity == "selective" and module in self.modules


@dataclass(frozen=True)
class Kept:
    """How a rank runs the model.

    Attributes:
        fused: Transformer Engine's kernels (flash attention, one kernel a norm, a gate or a rotary
            embedding); else Megatron's local layers as `megatron_dr/mcore/cpu` runs them.
        dropout: of hidden states: its masks are kept.
        rotary: queries and keys are turned by their positions: copies, where the value is a view.
    """

    shape: Shape
    recompute: Recompute = Recompute()
    fused: bool = True
    dropout: bool = False
    rotary: bool = True


def of_stage(
    stage: Stage, kept: Kept, microbatches: int, with_logits: bool = True
) -> dict[str, float]:
    """The most that a stage holds at once.

    `layers`: of all microbatches whose backward is not done, with the embedding's indices;
    `beside`: of one of them either the loss (the last norm, the softmax in fp32), or the layers
    that its backward runs again when the loss is gone.

    Args:
        microbatches: of a step, of both roles.
        with_logits: what autograd does not keep, but is there beside the softmax, too.
    """
    layout = stage.layout
    layers = layout.layers_of_a_chunk(stage.model.layers)
    of_chunk, again = _of_chunk(stage, kept, layers)
    chunks = in_flight(stage, microbatches)
    out = chunks * of_chunk + layout.vpp * _rotary(stage, kept)
    if stage.number == 0:  # of the first chunk
        out += -(-chunks // layout.vpp) * _embedding(stage, kept)
    loss = 0.0
    if stage.number == layout.pp - 1:
        loss = _loss(stage, kept) + (_logits(stage, kept) if with_logits else 0.0)
    return {"layers": out, "beside": max(loss, again)}


def in_flight(stage: Stage, microbatches: int) -> int:
    """Forwards of a chunk whose backward has not run (`core/pipeline_parallel/schedules.py`): one
    without pipeline stages, those of the stages that follow and its own with 1F1B, and with
    interleaved chunks the warm-up's, and one."""
    layout = stage.layout
    behind = layout.pp - stage.number - 1
    if layout.vpp == 1:
        return min(microbatches, behind + 1)
    warm_up = 2 * behind + (layout.vpp - 1) * layout.pp
    return min(microbatches * layout.vpp, warm_up + 1)


def _of_chunk(stage: Stage, kept: Kept, layers: int) -> tuple[float, float]:
    """Of a microbatch's forward of a chunk; and of what a backward runs again."""
    recompute, each = kept.recompute, layer(stage, kept)
    if recompute.granularity == "none":
        return layers * each, 0.0
    whole = layer(stage, dataclasses.replace(kept, recompute=Recompute()))
    if recompute.granularity == "selective":
        return layers * each, whole - each
    hidden = _rows(stage, kept)[1] * stage.model.hidden * stage.layout.weight_bytes
    number = min(recompute.layers, layers)
    own = number * whole - (0.0 if _copies(stage, kept) else hidden)  # the first input is there
    if recompute.distribute:
        hidden /= stage.layout.tp
    if recompute.block:  # the others' backward is over by then
        own = whole - (0.0 if _copies(stage, kept) else hidden) - (layers - number) * each
        return number * hidden + (layers - number) * each, max(0.0, own)
    return math.ceil(layers / number) * hidden, own


def _rotary(stage: Stage, kept: Kept) -> float:
    """Angles, which recomputed layers of a chunk read: the same for all microbatches."""
    if kept.fused or not kept.rotary or kept.recompute.granularity != "full":
        return 0.0
    return 4.0 * kept.shape.length / stage.layout.cp * stage.model.head_size


def _copies(stage: Stage, kept: Kept) -> bool:
    """Whether a norm keeps a copy of its input in fp32."""
    return not kept.fused and not stage.model.norm_bias and stage.layout.weight_bytes < 4


def _rows(stage: Stage, kept: Kept) -> tuple[float, float]:
    """T and S."""
    layout = stage.layout
    tokens = kept.shape.tokens / layout.cp
    return tokens, tokens / (layout.tp if layout.sequence_parallel else 1)


def layer(stage: Stage, kept: Kept) -> float:
    """Bytes that one layer saves of a microbatch (`core/transformer/transformer_layer.py`)."""
    model, layout = stage.model, stage.layout
    _, split = _rows(stage, kept)
    each = layout.weight_bytes
    hidden = split * model.hidden * each
    out = 2 * norm(model, kept, split, model.hidden, each)
    out += _attention(stage, kept) + 2 * split * model.hidden * kept.dropout * _mask(kept, each)
    if kept.recompute.has("moe" if model.experts else "mlp"):
        return out + hidden
    return out + hidden + (_experts(stage, kept) if model.experts else _mlp(stage, kept))


def _mask(kept: Kept, each: int) -> int:
    """Bytes of an element of a dropout's mask; in plain torch it is of the input's type."""
    return 1 if kept.fused else each


def norm(model: Model, kept: Kept, rows: float, size: int, each: int) -> float:
    """Its input and statistics; torch's RMSNorm keeps the input and what it normalised in fp32."""
    if kept.fused:
        return rows * (size * each + (8 if model.norm_bias else 4))
    if model.norm_bias:
        return rows * (size * each + 2 * each)
    return rows * (size * 8 + 4)


def _attention(stage: Stage, kept: Kept) -> float:
    """`core/transformer/attention.py`: the input of query, key and value, these three, and the
    input of the output layer. The value is a view of all three before the rotary embedding, which
    stay with it."""
    model, layout = stage.model, stage.layout
    tokens, split = _rows(stage, kept)
    each, head = layout.weight_bytes, model.head_size
    heads, groups = model.heads / layout.tp, max(1.0, model.groups / layout.tp)
    query, key = tokens * heads * head * each, tokens * groups * head * each
    out = split * model.hidden * each + (query + 2 * key) + query
    if model.qk_norm:
        out += norm(model, kept, tokens * heads, head, each)
        out += norm(model, kept, tokens * groups, head, each)
    turned = query + key if kept.rotary else 0.0
    if kept.fused:
        out += turned
        return out + (0.0 if kept.recompute.has("core_attn") else 4 * tokens * heads)
    # local layers: cosine and sine of query and key, and of the whole sequence's key and value
    length = kept.shape.length / layout.cp
    out += (4 * length * head * each if kept.rotary else 0.0) + turned + key * (layout.cp - 1)
    if layout.cp > 1:  # a gathered value of its own
        out += key * layout.cp - (query + 2 * key)
    if kept.recompute.has("core_attn"):
        return out
    return out + 4 * tokens * heads + length * kept.shape.length * each


def _gate(stage: Stage, kept: Kept) -> int:
    """Tensors as wide as the MLP's inner layer that it saves: before the activation and after it;
    without a fused gate also both of its factors."""
    if not stage.model.gated:
        return 2
    return 3 if kept.fused else 5


def _mlp(stage: Stage, kept: Kept) -> float:
    tokens, _ = _rows(stage, kept)
    inner = tokens * stage.model.ffn / stage.layout.tp * stage.layout.weight_bytes
    return inner * _gate(stage, kept)


def _experts(stage: Stage, kept: Kept) -> float:
    """`core/transformer/moe/`: each token's copies on the way to its experts, evenly dealt out, and
    their products with the router's probabilities; the router's own are small."""
    model, layout = stage.model, stage.layout
    tokens, _ = _rows(stage, kept)
    each = layout.weight_bytes
    visits = tokens * model.active * layout.etp / layout.tp
    inner = visits * model.expert_ffn / layout.etp * each
    copies = visits * model.hidden * each
    return copies + inner * (_gate(stage, kept) + (0 if kept.fused else 1))


def _embedding(stage: Stage, kept: Kept) -> float:
    tokens, split = _rows(stage, kept)
    dropped = split * stage.model.hidden * _mask(kept, stage.layout.weight_bytes)
    return 8 * tokens + (dropped if kept.dropout else 0.0)


def _loss(stage: Stage, kept: Kept) -> float:
    """The last norm, the output layer's input, and the softmax in fp32
    (`core/tensor_parallel/cross_entropy.py`): of one microbatch, whose backward follows at once."""
    model, layout = stage.model, stage.layout
    tokens, split = _rows(stage, kept)
    each = layout.weight_bytes
    logits = tokens * model.padded(layout.tp) / layout.tp
    out = norm(model, kept, split, model.hidden, each) + split * model.hidden * each
    return out + 4 * logits + 9 * tokens


def _logits(stage: Stage, kept: Kept) -> float:
    """In the weights' type; and their gradient in the backward."""
    tokens, _ = _rows(stage, kept)
    padded = stage.model.padded(stage.layout.tp)
    return tokens * padded / stage.layout.tp * stage.layout.weight_bytes
