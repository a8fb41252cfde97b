"""Which elements of which parameter this rank holds, and how often each counts in a gram.

Sketches of partial gradients are summed over every rank that holds a piece of the row, so a piece
that exists once counts once, a partial sum counts on every rank that has a part of it, and a copy
counts on one rank only:

| parameter | over tensor-parallel ranks | counts |
|---|---|---|
| linear and vocabulary weights | sharded | 1 on every rank |
| norms, biases, router | identical gradients | 1 on rank 0, else 0 |
| the same under sequence parallelism; q/k norms | partial gradients, summed by Megatron later | 1 |
| `average_gradients_across_tp_domain` | partial gradients, averaged by Megatron later | 1/T |
| tied embedding, copies on first and last pipeline stage | partial gradients | 1 on each copy |
| experts | sharded over expert-parallel ranks | 1 on every rank |

An exact gram multiplies gradients instead of summing sketches, so there partial gradients are first
summed over the ranks named by `partial`, and count on the first of them.

The rules are Megatron-Core's own: finalize_model_grads, param_is_not_tensor_parallel_duplicate.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dr.mcore import collectives
from megatron_dr.mcore.compat import unwrap
from megatron_dr.projection import UNPROJECTED, block_of, key_of


@dataclass(frozen=True, eq=False)
class OwnedParameter:
    """A parameter's place in the whole model.

    Attributes:
        name: its name in the model without parallelism.
        count: how often this rank's piece counts (the table above).
        partial: ranks over which Megatron sums this gradient after its data-parallel reduction:
            `tensor`, `embedding` (first and last pipeline stage) or none.
        dim: the dimension that is sharded over `shards` ranks, this being number `shard`.
        stride: the sharded dimension is `stride` stacked matrices, each sharded by itself
            (gate and up of a gated MLP).
    """

    parameter: torch.nn.Parameter
    name: str
    chunk: int
    count: float
    partial: Literal["", "tensor", "embedding"]
    dim: int
    stride: int
    shard: int
    shards: int

    @property
    def key(self) -> int:
        return key_of(self.name)

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to an expert that tokens are dispatched to."""
        return _is_expert(self.name)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape without tensor parallelism."""
        shape = list(self.parameter.shape)
        shape[self.dim] *= self.shards
        return tuple(shape)

    @property
    def global_numel(self) -> int:
        return self.parameter.numel() * self.shards

    def global_index(self, start: int, stop: int) -> torch.Tensor:
        """Positions [stop - start] in the whole parameter of local elements start..stop (flat).

        A shard is made of runs of elements that are neighbours in the whole parameter too, of
        part x inner elements: part, this rank's share of one stacked matrix along `dim`, and
        inner, the elements of the dimensions behind it. The whole parameter holds run r of every
        shard, then run r + 1 of every shard, so that

            local r run + i  is  global (r shards + shard) run + i .

        A span is cut into the end of a run, whole runs and the beginning of a run, so that each
        part is a sum of local positions and one number per run: no division per element, which
        in int64 is slow.
        """
        index = torch.arange(start, stop, device=self.parameter.device)
        if self.shards == 1:
            return index
        shape = self.parameter.shape
        run = shape[self.dim :].numel() // self.stride
        first = min(start + -start % run, stop)  # whole runs lie in [first, last)
        last = max(stop - stop % run, first)
        for begin, end in ((start, first), (first, last), (last, stop)):
            if begin < end:
                runs = torch.arange(begin // run, -(-end // run), device=index.device)
                shifts = (runs * (self.shards - 1) + self.shard) * run
                index[begin - start : end - start].view(len(runs), -1).add_(shifts[:, None])
        return index


def number_of_copy(owned: OwnedParameter) -> tuple[int, int]:
    """This rank among those with the parameter: tensor parallel, and data x context parallel."""
    if owned.is_expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_data_parallel_rank(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )


def owned_parameters(
    model: list[torch.nn.Module], config: TransformerConfig
) -> list[OwnedParameter]:
    """Every trainable parameter of this rank's model chunks."""
    owned = []
    for chunk, module in enumerate(model):
        bare = unwrap(module)
        numbers = _layer_numbers(bare)
        for local_name, parameter in bare.named_parameters():
            if parameter.requires_grad:
                name = _global_name(local_name, parameter, numbers, config)
                owned.append(_place(parameter, name, chunk, config))
    return owned


def _layer_numbers(module: torch.nn.Module) -> dict[str, int]:
    """'decoder.layers.<local number>' -> number in the whole model, from 0."""
    pattern = re.compile(r"(.*\.)?layers\.\d+")
    return {
        name: layer.layer_number - 1
        for name, layer in module.named_modules()
        if pattern.fullmatch(name) and hasattr(layer, "layer_number")
    }


def _global_name(
    name: str, parameter: torch.nn.Parameter, numbers: dict[str, int], config: TransformerConfig
) -> str:
    if name == "output_layer.weight" and getattr(parameter, "shared_embedding", False):
        return "embedding.word_embeddings.weight"  # the last stage's copy of the tied embedding
    match = re.match(r"((?:.*?\.)?layers\.)\d+", name)
    if match and match.group(0) in numbers:
        name = f"{match.group(1)}{numbers[match.group(0)]}{name[match.end() :]}"
    if config.num_moe_experts and parallel_state.get_expert_model_parallel_world_size() > 1:
        local = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        first = local * parallel_state.get_expert_model_parallel_rank()
        shift = lambda m: f"{m.group(1)}{int(m.group(2)) + first}"  # noqa: E731
        name = re.sub(r"(\.local_experts\.)(\d+)", shift, name)
        name = re.sub(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$", shift, name)
    return name


def _place(
    parameter: torch.nn.Parameter, name: str, chunk: int, config: TransformerConfig
) -> OwnedParameter:
    expert = _is_expert(name)
    if expert:
        shards = parallel_state.get_expert_tensor_parallel_world_size()
        shard = parallel_state.get_expert_tensor_parallel_rank()
    else:
        shards = parallel_state.get_tensor_model_parallel_world_size()
        shard = parallel_state.get_tensor_model_parallel_rank()
    if getattr(parameter, "tensor_model_parallel", False):
        # an adapter's A in front of a gated layer is sharded over its rank, not over gate and up
        gated = config.gated_linear_unit and ".linear_fc1." in name and ".lora_a." not in name
        stride = max(getattr(parameter, "partition_stride", 1), 2 if gated else 1)
        tied = not expert and getattr(parameter, "shared_embedding", False)
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        return OwnedParameter(
            parameter, name, chunk, 1.0, "embedding" if tied and stages > 1 else "",
            parameter.partition_dim, stride, shard, shards,  # type: ignore[attr-defined]
        )  # fmt: skip
    partial: Literal["", "tensor"] = ""
    if getattr(parameter, "average_gradients_across_tp_domain", False):
        count, partial = 1.0 / shards, "tensor"
    elif _is_partial(parameter, name, config):
        count, partial = 1.0, "tensor"
    else:
        count = 1.0 if shard == 0 else 0.0
    return OwnedParameter(parameter, name, chunk, count, partial, 0, 1, 0, 1)


def _is_expert(name: str) -> bool:
    """By the name, as routers and shared experts are dense layers (`.router.`, `.shared_experts.`).

    Megatron's mark of an expert (`allreduce` is False) is missing where experts are neither spread
    over ranks nor sharded otherwise than dense layers: there the expert groups are the dense ones,
    but tokens are dispatched all the same.
    """
    return ".experts." in name


def _is_partial(parameter: torch.nn.Parameter, name: str, config: TransformerConfig) -> bool:
    """Whether Megatron sums this parameter's gradient over tensor-parallel ranks in finalize."""
    sequence = config.sequence_parallel and getattr(parameter, "sequence_parallel", False)
    qk = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    return bool(sequence or qk)


def block_names(owned: list[OwnedParameter], kind: str) -> tuple[str, ...]:
    """The blocks of the whole model, in the same order on every rank (collective).

    One that is not projected is the last.
    """
    everyone = collectives.of_all_ranks([o.name for o in owned])
    names = {name for part in everyone for name in part}
    blocks = dict.fromkeys(block_of(name, kind) for name in sorted(names, key=_natural))
    return tuple(sorted(blocks, key=lambda name: name == UNPROJECTED))


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
