"""LoRA on the tests' small models: in a layout, and densely with effective weights.

The dense adapters' gradients are those of W_eff = W + s B A by the chain rule:
dL/dB = s dL/dW_eff A^T, dL/dA = s B^T dL/dW_eff.
"""

import math
from typing import Any

import numpy as np
import torch

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.mcore.model import lora

from . import _megatron, _oracle, _problem
from ._data import Layout
from ._oracle import Parameters
from ._problem import Problem

LORA = LoRAConfig(rank=4, alpha=6.0)


def linear(layout: Layout, config: LoRAConfig = LORA) -> list[str]:
    """Names of the layers with adapters."""
    names = [
        name.removesuffix(".weight")
        for name, shape in _oracle.shapes(layout).items()
        if ".layers." in name and len(shape) == 2
    ]
    return [name for name in names if config.matches(name)]


def initial(layout: Layout, config: LoRAConfig = LORA) -> Parameters:
    """The model's parameters and its adapters', B not zero, so that all gradients are of a size."""
    out = _oracle.initial(layout)
    generator = torch.Generator().manual_seed(11)
    for name in linear(layout, config):
        rows, columns = out[name + ".weight"].shape
        for matrix, shape in (("a", (config.rank, columns)), ("b", (rows, config.rank))):
            out[f"{name}.lora_{matrix}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    return out


def split(everything: Parameters) -> tuple[Parameters, Parameters]:
    """The base model's parameters and the adapters'."""
    adapters = {name: v for name, v in everything.items() if ".lora_" in name}
    return {name: v for name, v in everything.items() if name not in adapters}, adapters


def effective(base: Parameters, adapters: Parameters, scale: float) -> Parameters:
    """W + s B A for the layers with adapters, W for the others."""
    out = dict(base)
    for name in adapters:
        if name.endswith(".lora_a.weight"):
            layer = name.removesuffix(".lora_a.weight")
            product = adapters[layer + ".lora_b.weight"] @ adapters[name]
            out[layer + ".weight"] = base[layer + ".weight"] + scale * product
    return out


def by_chain_rule(gradient: Parameters, adapters: Parameters, scale: float) -> Parameters:
    """Gradients of the adapters from those of the effective weights."""
    out = {}
    for name in adapters:
        layer, matrix = name.split(".lora_")
        d = gradient[layer + ".weight"]
        if matrix == "a.weight":
            out[name] = scale * adapters[layer + ".lora_b.weight"].T @ d
        else:
            out[name] = scale * d @ adapters[layer + ".lora_a.weight"].T
    return out


def train_densely(
    layout: Layout, problem: Problem, steps: int, start: Parameters, scale: float
) -> tuple[Parameters, list[dict[str, np.ndarray]]]:
    """As `_oracle.train`, for the adapters alone."""
    base, adapters = split({name: value.double() for name, value in start.items()})
    optimizer = torch.optim.AdamW(
        adapters.values(), lr=_megatron.LEARNING_RATE, eps=_megatron.EPS, weight_decay=0.0
    )
    history = []
    for step in range(steps):
        weights = {k: v.requires_grad_() for k, v in effective(base, adapters, scale).items()}
        general, target = _oracle.rows(layout, weights, step)
        general = [by_chain_rule(row, adapters, scale) for row in general]
        target = by_chain_rule(target, adapters, scale)
        update, found = _problem.project(problem, general, target, step)
        norm = math.sqrt(sum(float(u.square().sum()) for u in update.values()))
        for name, value in adapters.items():
            value.grad = update[name] * min(1.0, _megatron.CLIP / (norm + 1e-6))
        optimizer.step()
        for weight in base.values():
            weight.requires_grad_(False)
        history.append(found)
    return adapters, history


def use_adapters(config: LoRAConfig = LORA) -> None:
    """On a rank: models that `_megatron.build` makes get adapters before DDP wraps them.

    The tests' loader goes by the names of trainable parameters: first the model's, then, once it is
    frozen, the adapters'; those that `initial` has not keep the values that add_lora gave them.
    """
    stock = _megatron.load

    def load(model: list[Any], transformer: Any, start: Parameters) -> None:
        stock(model, transformer, start)
        lora.add_lora(model, config, transformer)
        if any(".lora_" in name for name in start):
            stock(model, transformer, start)

    _megatron.load = load


def frozen(model: list[Any]) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are not trained."""
    return {
        f"{number}.{name}": parameter.detach().clone()
        for number, chunk in enumerate(model)
        for name, parameter in chunk.named_parameters()
        if not parameter.requires_grad
    }
