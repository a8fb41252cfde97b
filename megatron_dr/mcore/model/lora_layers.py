"""Megatron's two linear layers with an adapter each: y = W x + (alpha / r) B dropout(A x).

An adapter's matrices are Megatron's own linear layers of its layer's kind; T tensor-parallel ranks:

| W | A | h = A x | dropout on | B |
|---|---|---|---|---|
| column, [out / T, in] | column, [r / T, in] | [s, b, r / T] | h; gathered | column, [out / T, r] |
| row, [out, in / T] | row, [r, in / T] | [s, b, r], summed | a slice of r / T | row, [out, r / T] |

Both matrices are always sharded, so no gradient of an adapter is a copy or a partial sum over
tensor-parallel ranks, with sequence parallelism or without. Under sequence parallelism the column
layer's A gathers the sequence and the row layer's B scatters it; the other matrix sees it whole.
Dropout acts on each rank's own slice of h and not on whole ones, because masks differ between
tensor-parallel ranks: under sequence parallelism Megatron runs its layers with a generator per
rank, and ranks with different masks on the same h would sum gradients of different functions.
"""

import contextlib
import copy
import math
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dr.config.lora import LoRAConfig
from megatron_dr.mcore import collectives
from megatron_dr.mcore.ownership import OwnedParameter

NAMES = ("lora_a", "lora_b")


class Adapted(torch.nn.Module):
    """What the two adapted layers share; mixed in before Megatron's class.

    Attributes:
        lora_a, lora_b: A and B.
        lora: rank, scale and dropout.
        lora_gated: B's rows are two stacked matrices, gate and up of a gated MLP.
    """

    lora_a: ColumnParallelLinear | RowParallelLinear
    lora_b: ColumnParallelLinear | RowParallelLinear
    lora: LoRAConfig
    lora_gated: bool
    config: TransformerConfig  # this and the next two are Megatron's layer's own
    tp_group: collectives.Group
    weight: torch.nn.Parameter

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        output, bias = super().forward(input_, *args, **kwargs)
        part = self.lora_scale(self.lora_hidden(input_))
        delta, _ = self.lora_b(self.lora_input_of_b(part))  # laid out as W x is
        return output + delta, bias

    def lora_scale(self, part: torch.Tensor) -> torch.Tensor:
        """(alpha / r) dropout(h) for this rank's slice of h; a mask per rank, as in attention."""
        own = self.config.sequence_parallel or not self.training or self.lora.dropout == 0.0
        with contextlib.nullcontext() if own else get_cuda_rng_tracker().fork():
            part = torch.nn.functional.dropout(part, self.lora.dropout, self.training)
        return self.lora.scale * part

    def lora_hidden(self, input_: torch.Tensor) -> torch.Tensor:
        """This rank's slice of h = A x [s, b, r / T]."""
        raise NotImplementedError

    def lora_input_of_b(self, part: torch.Tensor) -> torch.Tensor:
        """What this rank's B multiplies, from the slice."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The layer's own entries, and A and B as their own layers shard them.

        Gate and up are sharded each by itself, as Megatron's MLP does for the weight.
        """
        stock = super().sharded_state_dict  # type: ignore[misc]
        state: dict[str, Any] = stock(prefix, sharded_offsets, metadata)
        for name in NAMES:
            matrix = getattr(self, name)
            state.update(matrix.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        if self.lora_gated:
            key = f"{prefix}lora_b.weight"
            state[key] = apply_swiglu_sharded_factory(
                state[key], sharded_offsets, metadata.get("singleton_local_shards", False),
                tp_group=self.tp_group, dp_group=metadata["dp_cp_group"],
            )  # fmt: skip
        return state

    def lora_whole(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B with the ranks' shards of r put together."""
        raise NotImplementedError


class AdaptedColumn(Adapted, ColumnParallelLinear):  # type: ignore[misc]
    """ColumnParallelLinear with an adapter."""

    def lora_hidden(self, input_: torch.Tensor) -> torch.Tensor:
        part: torch.Tensor = self.lora_a(input_)[0]
        return part

    def lora_input_of_b(self, part: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = gather_from_tensor_model_parallel_region(part, group=self.tp_group)
        return hidden

    def lora_whole(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return collectives.gathered(a, self.tp_group), b


class AdaptedRow(Adapted, RowParallelLinear):  # type: ignore[misc]
    """RowParallelLinear with an adapter."""

    def lora_hidden(self, input_: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lora_a(input_)
        part: torch.Tensor = scatter_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return part

    def lora_input_of_b(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def lora_whole(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return a, collectives.gathered(b.t(), self.tp_group).t().contiguous()


KINDS = {ColumnParallelLinear: AdaptedColumn, RowParallelLinear: AdaptedRow}


def adapt(
    layer: ColumnParallelLinear | RowParallelLinear, name: str, lora: LoRAConfig,
    config: TransformerConfig,
) -> None:  # fmt: skip
    """Give a layer of one of Megatron's two kinds an adapter, in place.

    The layer keeps its identity, hooks and parameter names (its class becomes a subclass of its
    own), so checkpoints without adapters have the same names for everything else.
    """
    kind = type(layer)
    shared = copy.copy(config)
    shared.perform_initialization = False  # `initialize` does it, whatever the layout
    whole = copy.copy(shared)
    whole.sequence_parallel = False
    options: dict[str, Any] = {
        "init_method": config.init_method, "bias": False, "skip_bias_add": False,
        "tp_group": layer.tp_group,
    }  # fmt: skip
    of_a, of_b = shared, whole
    if kind is RowParallelLinear:
        options["input_is_parallel"] = True
        of_a, of_b = whole, shared
    a = kind(layer.input_size, lora.rank, config=of_a, **options)
    b = kind(lora.rank, layer.output_size, config=of_b, **options)
    layer.__class__ = KINDS[kind]
    layer.lora_a, layer.lora_b, layer.lora = a, b, lora
    layer.lora_gated = bool(config.gated_linear_unit) and name.endswith(".linear_fc1")


@torch.no_grad()
def initialize(adapters: list[OwnedParameter], seed: int) -> None:
    """B = 0, and A uniform in +-1/sqrt(in): Kaiming's rule with a = sqrt(5), LoRA's own choice.

    A's values are drawn for the whole matrix from a seed of its name in the whole model, and each
    rank takes its shard: the same values in every layout.
    """
    for owned in adapters:
        parameter = owned.parameter
        if owned.name.endswith(".lora_b.weight"):
            parameter.zero_()
            continue
        generator = torch.Generator().manual_seed((owned.key + seed) % 2**63)
        values = torch.empty(owned.whole_shape)
        torch.nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
        index = owned.global_index(0, parameter.numel()).cpu()
        parameter.copy_(values.reshape(-1)[index].view_as(parameter))


@torch.no_grad()
def merge(layer: AdaptedColumn | AdaptedRow) -> None:
    """W <- W + (alpha / r) B A in fp32, rounded once to W's type; the adapter goes (collective)."""
    a, b = layer.lora_whole(layer.lora_a.weight.float(), layer.lora_b.weight.float())
    layer.weight.copy_(layer.weight.float() + layer.lora.scale * (b @ a))
    for name in (*NAMES, "lora", "lora_gated"):
        delattr(layer, name)
    layer.__class__ = next(kind for kind, adapted in KINDS.items() if type(layer) is adapted)
