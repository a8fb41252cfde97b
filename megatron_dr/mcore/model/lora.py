"""LoRA: freeze a Megatron model, train adapters on its linear layers, fold them into the weights.

    chunks = [GPTModel(...), ...]                      # this rank's, before DDP wraps them
    add_lora(chunks, LoRAConfig(rank=8), config)
    ...                                                # DDP, optimizer, attach, training
    merge_lora(chunks)                                 # W + (alpha / r) B A, no adapters

`LoRAPart` is the first step in Megatron's training loop (`pre_wrap_hooks`).
What an adapted layer computes is in `lora_layers.py`.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.mcore import collectives, compat, errors
from megatron_dr.mcore.model import lora_layers
from megatron_dr.mcore.ownership import owned_parameters
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.part import Part

_HOOK = "_megatron_dr_lora_hook"


class LoRAPart(Part):
    """--dr-lora-rank: adapters on a frozen model."""

    name, config, switch, flag = "lora", LoRAConfig, "rank", "--dr-lora-rank"
    who, refused, adds_weights = compat.WHO, compat.REFUSED, True

    def on_model(self, own: LoRAConfig, args: Namespace) -> Callable[[list[Any]], list[Any]]:
        lora = dataclasses.replace(own, seed=args.seed)

        def hook(model: list[Any]) -> list[Any]:
            with errors.refused():
                add_lora(model, lora, get_model_config(model[0]))
            return model

        return hook

    def kept(self, own: LoRAConfig, before: Namespace) -> dict[str, str]:
        why = "its adapters are of that kind"
        return {f"dr-lora-{name}": why for name in ("rank", "alpha", "targets")}

    def owns(self, key: Any) -> bool:
        return isinstance(key, str) and any(f".{name}." in key for name in lora_layers.NAMES)


def add_lora(
    model: Sequence[torch.nn.Module], lora: LoRAConfig, config: TransformerConfig
) -> tuple[str, ...]:
    """Freeze the model and give its linear layers adapters, which are all that is trained.

    Call it on every rank (collective), before DDP and the optimizer are made. With B = 0 the model
    computes what it did before.

    Args:
        model: this rank's model chunks.
        lora: rank, scale, dropout and which layers.
        config: the model's own configuration.

    Returns:
        Names in the whole model of the layers of this rank that got adapters.

    Raises:
        ValueError: no layer matches, a pipeline stage is left without adapters, or a layer that
            adapters can't be put on; on every rank, in one sentence.
    """
    for chunk in model:
        chunk.requires_grad_(True)  # names are those of trainable parameters
    layers = _weights(model, config)
    targets = {name: layer for name, layer in layers.items() if lora.matches(name)}
    with errors.agreed():
        _check_rank(targets, lora, config)
    _check_all(list(targets), list(layers), lora)
    for chunk in model:
        _freeze(chunk)
    for name, layer in targets.items():
        lora_layers.adapt(layer, name, lora, config)
    adapters = owned_parameters(list(model), config)
    lora_layers.initialize(adapters, lora.seed)
    _say(lora, {a.name: a.global_numel for a in adapters})
    return tuple(targets)


def merge_lora(model: Sequence[torch.nn.Module]) -> None:
    """Fold every adapter into its layer's weight and remove it (collective).

    What the model computes, its parameters' names and its checkpoints are then those of a model
    that never had adapters. It stays frozen: a DDP wrapper and an optimizer made before know only
    the adapters, so save it, evaluate it, or build them anew.
    """
    for chunk in model:
        bare = compat.unwrap(chunk)
        for layer in list(bare.modules()):
            if isinstance(layer, (lora_layers.AdaptedColumn, lora_layers.AdaptedRow)):
                lora_layers.merge(layer)
        if hasattr(bare, _HOOK):
            getattr(bare, _HOOK).remove()
            delattr(bare, _HOOK)


def _weights(
    model: Sequence[torch.nn.Module], config: TransformerConfig
) -> dict[str, torch.nn.Module]:
    """Modules with a weight matrix within transformer layers, by name in the whole model."""
    holders = {
        id(module.weight): module
        for chunk in model
        for module in chunk.modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    }
    return {
        owned.name.removesuffix(".weight"): holders[id(owned.parameter)]
        for owned in owned_parameters(list(model), config)
        if ".layers." in owned.name
        and owned.name.endswith(".weight")
        and owned.parameter.dim() == 2
    }


def _check_rank(
    targets: dict[str, torch.nn.Module], lora: LoRAConfig, config: TransformerConfig
) -> None:
    """What may differ between ranks."""
    for name, layer in targets.items():
        if type(layer) not in lora_layers.KINDS:
            raise ValueError(
                f"LoRA adapts Megatron's ColumnParallelLinear and RowParallelLinear, but {name} is "
                f"a {type(layer).__name__}: change the targets, or use --transformer-impl local."
            )
        if layer.is_expert:
            raise ValueError(
                f"LoRA does not adapt experts, but the targets {lora.pattern!r} match {name}: "
                "name the attention's layers alone, for example 'linear_qkv|linear_proj'."
            )
    tp = parallel_state.get_tensor_model_parallel_world_size()
    if lora.rank % tp:
        raise ValueError(
            f"LoRA's rank {lora.rank} must be a multiple of the tensor-parallel size {tp}, over "
            "which A and B are sharded."
        )
    if config.init_model_with_meta_device:
        raise ValueError("LoRA needs parameters with values: drop --init-model-with-meta-device.")


def _check_all(targets: list[str], layers: list[str], lora: LoRAConfig) -> None:
    """Every pipeline stage has adapters (collective)."""
    everyone = collectives.of_all_ranks((targets, layers))
    matched = [bool(found) for found, _ in everyone]
    if not any(matched):
        kinds = sorted({name.rsplit(".", 1)[-1] for _, names in everyone for name in names})
        raise ValueError(
            f"LoRA's targets {lora.pattern!r} match none of the model's layers, whose names end in "
            f"{', '.join(kinds)}: change the targets."
        )
    if not all(matched):
        raise ValueError(
            f"LoRA's targets {lora.pattern!r} match nothing on the pipeline stage of rank "
            f"{matched.index(False)}, which would have nothing to train: change the targets, or "
            "the pipeline's size."
        )


def _freeze(chunk: Any) -> None:
    """No parameter of the model is trained, and its expert biases stay as they are.

    The embedding's output then needs no gradient by itself, and a recomputed layer whose input
    needs none would leave its adapters without: so the output is marked.
    """
    chunk.requires_grad_(False)
    for module in chunk.modules():
        if hasattr(module, "frozen_expert_bias"):
            module.frozen_expert_bias = True
    if hasattr(chunk, "embedding"):
        setattr(chunk, _HOOK, chunk.embedding.register_forward_hook(_needs_gradient))


def _needs_gradient(_: torch.nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _say(lora: LoRAConfig, sizes: dict[str, int]) -> None:
    """How much is trained, on rank 0 (collective)."""
    everyone = collectives.of_all_ranks(sizes)
    whole = {name: size for part in everyone for name, size in part.items()}
    say(
        f"LoRA of rank {lora.rank} on {len(whole) // 2} layers: {sum(whole.values()):,} "
        "parameters are trained, the model is frozen"
    )
