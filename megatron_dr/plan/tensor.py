"""Seconds that tensor-parallel collectives add to a microbatch's forward and backward.

Of two linear layers, the first split by its outputs and the second by its inputs
(`core/tensor_parallel/layers.py`), with sequence parallelism:

    forward    all-gather of the first's input, reduce-scatter of the second's output
    backward   all-gather of the second's gradient; of the first's input once more, beside the
               product of its gradient; reduce-scatter of that, beside the product of the weight's

and without it an all-reduce of the second's output, and one of the first's gradient, beside the
product of the weight's. What is beside a product is exposed as far as it takes longer, and wholly
where the hardware does one after the other (`Hardware.overlaps`). Attention has such a pair and the
MLP another; the output layer is a first, the embedding a second. The loss has three all-reduces of
one number for each token.
"""

from megatron_dr.plan.activations import Kept
from megatron_dr.plan.buffers import Stage
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.wire import Send

_FLOAT = 4  # bytes, of the loss


def seconds(stage: Stage, kept: Kept, hardware: Hardware) -> float:
    """Of a stage's layers, embedding and loss. Full recompute runs layers' forwards again."""
    model, layout = stage.model, stage.layout
    if layout.tp == 1:
        return 0.0
    tokens, group = kept.shape.tokens / layout.cp, layout.tensor_group(stage.number)
    payload = tokens * model.hidden * layout.weight_bytes
    ring = hardware.alone([Send("tensor", "ring", payload, group)])

    def first_backward(outputs: int) -> float:
        """Of a layer that is split by its outputs, so many on all ranks."""
        product = 2 * tokens * model.hidden * outputs / layout.tp / hardware.flops
        beside = [ring, ring] if layout.sequence_parallel else [2 * ring]
        return sum(max(0.0, each - product * hardware.overlaps) for each in beside)

    again = 2 if kept.recompute.granularity == "full" else 1
    one_way = ring if layout.sequence_parallel else 0.0
    layers = layout.layers_of_a_chunk(model.layers) * layout.vpp
    out = layers * sum(
        again * 2 * ring + one_way + first_backward(outputs) for outputs in _firsts(stage)
    )
    if stage.number == 0:
        out += 2 * ring
    if stage.number == layout.pp - 1:
        numbers = Send("tensor", "reduce", tokens * _FLOAT, group)
        out += one_way + first_backward(model.padded(layout.tp)) + hardware.alone([numbers] * 3)
    return out


def _firsts(stage: Stage) -> list[int]:
    """Outputs of the first linear layer of each of a layer's pairs; experts of one tensor rank
    each have none."""
    model, gate = stage.model, 2 if stage.model.gated else 1
    found = [(model.heads + 2 * model.groups) * model.head_size]
    if not model.experts:
        found.append(gate * model.ffn)
    elif stage.layout.etp > 1:
        found.append(gate * model.expert_ffn * model.active)
    return found
