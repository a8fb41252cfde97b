"""The memory of training adapters alone, by their share of what a rank would train."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

from megatron_dr.plan import fit, report
from megatron_dr.plan.asked import Asked
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.step import Run

GB = 1e9
# Of what is trained; weights stay, and so do activations, as the backward needs every layer's input
_TRAINED = ("gradients", "optimizer", "slots", "target", "in flight", "grams")
NOTE = "Adapters alone are trained: what is sent and the seconds are those of all weights."


def elements(model: Model, layout: Layout, rank: int, layers: Collection[str]) -> float:
    """Of a rank of a stage: r (in + out) / TP for each matrix (`mcore/model/lora_layers.py`).

    Args:
        layers: names of Megatron's linear layers that have adapters.
    """
    h, q = model.hidden, model.heads * model.head_size
    qkv = q + 2 * model.groups * model.head_size
    sides = {
        "linear_qkv": h + qkv, "linear_proj": q + h,
        "linear_fc1": h + model.ffn * (2 if model.gated else 1), "linear_fc2": model.ffn + h,
    }  # fmt: skip
    found = sum(sides[name] for name in layers)
    return rank * found / layout.tp * model.layers / layout.pp


def alone(asked: Asked, rank: int, layers: Collection[str]) -> Asked:
    """The same, where adapters alone are trained: slots are buffers of theirs."""
    if asked.wanted is None:
        return asked
    trained = functools.partial(elements, rank=rank, layers=layers)
    return dataclasses.replace(asked, wanted=dataclasses.replace(asked.wanted, trained=trained))


def report_of(
    run: Run, hardware: Hardware, said: list[str], rank: int, layers: Collection[str]
) -> dict[str, Any]:
    """As `report`, where the run's adapters alone are trained."""
    own = elements(run.model, run.layout, rank, layers)
    numbers = report.report(run, hardware, [*said, NOTE])
    memory = numbers["memory"]
    whole = memory["most"]
    for stage, parts in zip(stages(run.model, run.layout), memory["stages"], strict=True):
        share = own / sum(b.filled for b in stage.buffers)
        parts |= {name: share * parts[name] for name in _TRAINED if name in parts}
        parts["weights"] += run.layout.weight_bytes * own
    memory["most"] = max(sum(parts.values()) for parts in memory["stages"])
    saved = whole - memory["most"]
    roomier = dataclasses.replace(hardware, memory=hardware.memory + saved)
    numbers["largest_micro_batch"] = fit.largest_micro_batch(run, roomier)
    numbers["refusal"] = ""
    if memory["most"] > hardware.usable:
        numbers["refusal"] = (
            f"It does not fit: a rank needs {memory['most'] / GB:.1f} GB of "
            f"{hardware.usable / GB:.1f} with adapters alone; give a larger layout.tp or "
            "layout.pp, batch.micro=1 or recompute=full."
        )
    return numbers
