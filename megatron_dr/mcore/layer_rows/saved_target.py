"""The target's features in a checkpoint, for a resume between two target passes, in any layout.

A sketch is of the whole weight; other features have the weight's shape and are sharded as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_dr.mcore import collectives
from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.mcore.ownership import number_of_copy

Values = dict[int, torch.Tensor]  # by the place's number


def sharded(places: Sequence[Place], values: Values, seed: int) -> dict[str, ShardedTensor]:
    """What `dist_checkpointing.save` writes (collective)."""
    found: dict[str, ShardedTensor] = {}
    for place in places:
        value = values.get(place.number)
        value = _blank(place) if value is None else value
        if place.owned.partial == "embedding":  # a part on the first and one on the last stage
            value = value.clone()
            collectives.all_reduce(value, parallel_state.get_embedding_group())
        found |= _pieces(place, value, seed)
    return found


def load(places: Sequence[Place], path: Path, seed: int) -> Values | None:
    """What was saved there; None where it is of another score, size or seed (collective)."""
    pieces = {p.number: _pieces(p, _blank(p), seed) for p in places}
    wanted = {key: piece for of_place in pieces.values() for key, piece in of_place.items()}
    saved = dist_checkpointing.load_tensors_metadata(str(path))
    fits = all(
        key in saved and tuple(saved[key].global_shape) == tuple(piece.global_shape)
        for key, piece in wanted.items()
    )
    if not all(collectives.of_all_ranks(fits)):
        return None
    loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(path))
    values: Values = {}
    for place in places:
        parts = [loaded[key] for key in pieces[place.number]]
        value = parts[0] if len(parts) == 1 else torch.cat(parts, place.owned.dim)
        values[place.number] = torch.zeros_like(value) if _copy(place) else value
    return values


def _pieces(place: Place, value: torch.Tensor, seed: int) -> dict[str, ShardedTensor]:
    owned = place.owned
    tensor, data = number_of_copy(owned)
    key = f"dr_target.{owned.name}.{place.score}"
    if _is_sketch(place):
        key, copy = f"{key}.{seed}", (_copy(place), tensor, data)
        return {key: ShardedTensor.from_rank_offsets(key, value, replica_id=copy)}
    copy = (_copy(place), 0 if owned.shards > 1 else tensor, data)
    stacked = value.chunk(owned.stride, owned.dim)  # each matrix is sharded by itself
    keys = [f"{key}.{number}" for number in range(len(stacked))]
    shard = (owned.dim, owned.shard, owned.shards)
    return {
        key: ShardedTensor.from_rank_offsets(key, part.contiguous(), shard, replica_id=copy)
        for key, part in zip(keys, stacked, strict=True)
    }


def _blank(place: Place) -> torch.Tensor:
    parameter, shape = place.owned.parameter, tuple(place.owned.parameter.shape)
    if _is_sketch(place):
        sides = zip((place.p_out, place.p_in), place.owned.whole_shape, strict=True)
        out, inner = (length if side is None else len(side) for side, length in sides)
        shape = (out * inner,)
    return torch.zeros(shape, dtype=torch.float32, device=parameter.device)


def _is_sketch(place: Place) -> bool:
    return place.score == "sketched" and not place.is_vector


def _copy(place: Place) -> int:
    """1 on the stage that has the second copy of a tied embedding."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    return int(place.owned.partial == "embedding" and not first)
