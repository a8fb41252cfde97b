"""A parameter's place in the layer path: how it is scored, and over which ranks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.mcore.layer_rows.weigh import needs_rows
from megatron_dr.mcore.ownership import OwnedParameter
from megatron_dr.projection import block_of
from megatron_dr.projection.flops import Score, Work, cheapest
from megatron_dr.projection.kronecker import Kronecker, sizes_for


@dataclass
class Place:
    """Fixed at attach.

    Attributes:
        number: of the parameter among this rank's.
        block: number of its block in the whole model.
        score: how its samples' gradients are multiplied; vectors are always exact.
        uses: how often a microbatch uses it on this rank (2: an output layer that is tied to the
            embedding of the same stage).
        p_out, p_in: the sketch's two sides, columns of this rank's shard; None is the identity.
        sizes: K_out and K_in, which are the weight's own where a side is the identity.
        sums: process groups over which a sample's features are summed: its weight's shards
            (sketches) and its tokens' shares.
        tokens: process groups over which a sample's tokens are spread; `ghost` gathers them.
        target_sums: process groups over which the target's features are summed.
        gram_group: ranks whose shards' grams are summed, or None.
        is_first: whether this rank speaks for those that have the same features.
    """

    number: int
    owned: OwnedParameter
    block: int
    score: Score
    uses: int
    p_out: torch.Tensor | None
    p_in: torch.Tensor | None
    sizes: tuple[int, int]
    sums: list[Any]
    tokens: list[Any]
    target_sums: list[Any]
    gram_group: Any
    is_first: bool

    @property
    def is_vector(self) -> bool:
        return self.owned.parameter.dim() == 1

    @property
    def speaks(self) -> bool:
        """Whether this rank speaks for those that share the weight's shards or samples' tokens."""
        return self.is_first and not any(map(dist.get_rank, self.tokens))

    @property
    def share(self) -> float:
        """How this rank's gram counts in a sum over all tensor x pipeline ranks."""
        if self.owned.partial == "embedding" and not parallel_state.is_pipeline_first_stage(
            ignore_virtual=True
        ):
            return 0.0
        return 1.0 if self.gram_group is not None or self.is_first else 0.0


@dataclass(frozen=True)
class BatchShape:
    """Of a general microbatch on this rank: what the FLOP model of `auto` asks for.

    Attributes:
        samples, targets: general samples, and target samples beside them.
        tokens: of a sample on this rank.
    """

    samples: int
    targets: int
    tokens: int


def places(
    owned: list[OwnedParameter], names: tuple[str, ...], dr: DRConfig, batch: BatchShape,
    model: list[torch.nn.Module],
) -> list[Place]:  # fmt: skip
    """The places of this rank's parameters.

    Args:
        names: of the blocks of the whole model.
    """
    number, twice = {name: n for n, name in enumerate(names)}, _used_twice(model)
    routed = _routed(batch, compat.unwrap(model[0]).config)
    return [
        _place(n, o, number[block_of(o.name, dr.blocks)], dr,
               routed if o.is_expert else batch, twice)
        for n, o in enumerate(owned)
    ]  # fmt: skip


def move(places: list[Place], device: torch.device) -> int:
    """The sketches' projections to a device; bytes that moved."""
    moved = 0
    for place in places:
        for side in ("p_out", "p_in"):
            matrix = getattr(place, side)
            if matrix is not None and matrix.device != device:
                setattr(place, side, matrix.to(device))
                moved += matrix.nbytes
    return moved


def _routed(batch: BatchShape, config: Any) -> BatchShape:
    """What an expert sees of it on average."""
    if not config.num_moe_experts:
        return batch
    tokens = max(1, batch.tokens * config.moe_router_topk // config.num_moe_experts)
    return BatchShape(batch.samples * experts.peers(), batch.targets * experts.peers(), tokens)


def _used_twice(model: list[torch.nn.Module]) -> set[int]:
    """Embeddings that are the output layer of the same stage too."""
    chunks = [compat.unwrap(chunk) for chunk in model]
    return {
        id(chunk.embedding.word_embeddings.weight)  # type: ignore[union-attr]
        for chunk in chunks
        if chunk.pre_process and chunk.post_process and chunk.share_embeddings_and_output_weights
    }


def _place(
    number: int, owned: OwnedParameter, block: int, dr: DRConfig, batch: BatchShape,
    twice: set[int],
) -> Place:  # fmt: skip
    parameter, sharded = owned.parameter, owned.shards > 1
    tokens, shards, data, first = _groups(owned)
    score: Score = "exact"
    p_out = p_in = None
    sizes = (0, 0)
    if parameter.dim() == 2:
        out, inner = owned.whole_shape
        sizes = sizes_for(dr.wanted_error, out, inner, dr.kronecker_out, dr.kronecker_in)
        score = _score(owned, dr, batch, sizes)
    if score == "sketched":
        p_out, p_in = _projections(owned, dr, sizes)
    pieces = [shards] if sharded and score == "sketched" else []
    cp = parallel_state.get_context_parallel_group()  # part of the data group
    target_sums = [*pieces, *(g for g in tokens if g is not cp), data]
    gram_group = shards if sharded and score != "sketched" else None
    return Place(
        number, owned, block, score, 2 if id(parameter) in twice else 1, p_out, p_in, sizes,
        pieces if score == "ghost" else pieces + tokens, tokens, target_sums, gram_group, first,
    )  # fmt: skip


def _groups(owned: OwnedParameter) -> tuple[list[Any], Any, Any, bool]:
    """Ranks over which a sample's tokens are spread; over which the weight is; over which the
    target's samples are; whether this rank speaks for its like."""
    tp = parallel_state.get_tensor_model_parallel_group()
    cp = parallel_state.get_context_parallel_group()
    if owned.is_expert:
        tokens, data, first = experts.token_groups(), experts.data_group(), experts.is_first()
        shards = parallel_state.get_expert_tensor_parallel_group()
    else:
        tokens = [tp, cp] if owned.partial == "tensor" else [cp]
        shards, data, first = tp, compat.data_group(), dist.get_rank(tp) == 0
    return [g for g in tokens if dist.get_world_size(g) > 1], shards, data, first


def _score(owned: OwnedParameter, dr: DRConfig, batch: BatchShape, sizes: tuple[int, int]) -> Score:
    if dr.score != "auto":
        return dr.score
    if owned.partial == "embedding" or dr.window == "step":
        return "sketched"  # samples' features must add up over stages or stay to the step's end
    out, inner = owned.parameter.shape
    return cheapest(Work(
        out, inner, batch.samples, batch.tokens, batch.targets, *sizes, needs_rows(dr)
    ))  # fmt: skip


def _projections(
    owned: OwnedParameter, dr: DRConfig, sizes: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """P_out and P_in on this rank: the columns of its shard."""
    out, inner = owned.whole_shape
    sketch = Kronecker(owned.name, out, inner, *sizes, dr.seed)
    rows = columns = None
    if "embedding" in owned.name:  # its rows are looked up, also where P_out is the identity
        rows = torch.arange(out)
    if owned.shards > 1:
        index = owned.global_index(0, owned.parameter.numel()).view(owned.parameter.shape)
        rows, columns = (index[:, 0] // inner, None) if owned.dim == 0 else (None, index[0] % inner)
    device, dtype = owned.parameter.device, torch.float32
    p_out = sketch.columns("out", rows, device, dtype)
    return p_out, sketch.columns("in", columns, device, dtype)
