"""The exact gram, riding on the reduce-scatter.

A reduce-scatter sends (D - 1)/D of a buffer per rank; so does an all-to-all that leaves on each
rank all D ranks' slices of its own shard. Those slices give the exact gram, which sums over shards,
and their weighted sum *is* the reduce-scatter's result. So Megatron's own reduction is left out,
and what a step sends beyond it is the further buffers of a rank (slots, target) and the grams.

Slices are kept in place: once sent, a rank's buffer is free to hold the slices that it received. So
the extra memory is one chunk of a bucket at a time and the grams, for every kind of block.

Partial gradients are never multiplied: those that Megatron sums over tensor-parallel ranks (norms
under sequence parallelism) or between the first and last stage (a tied embedding) are summed first,
as the small tensors that they are. The combined gradient stays partial: Megatron sums it later.

Legend: B blocks, L buffers of a rank, P of all row groups, R rows and target, D ranks of a group,
N elements of a shard.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore import collectives, compat, meter
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.layout import Gram, Layout, not_finite
from megatron_dr.mcore.buffer_rows.units import Segment, Unit, by_block, units_of
from megatron_dr.mcore.compat import BucketGroup, Chunk

_CHUNK = 1 << 25  # elements that are exchanged at a time
_PRODUCT = 1 << 20  # elements in float64 that are multiplied at a time
_PARTIAL = {  # ranks whose partial gradients are summed first, by the kind of these
    "tensor": parallel_state.get_tensor_model_parallel_group,
    "embedding": parallel_state.get_embedding_group,
}


class ExactGram:
    """Grams of whole gradients; `combine` leaves the gradient reduced over data ranks."""

    def __init__(self, buffers: Buffers, layout: Layout, model: list[Chunk]) -> None:
        self.buffers, self.layout, self.model = buffers, layout, model
        self.units = units_of(model, buffers, layout)  # by bucket group

    def all_units(self) -> Iterator[Unit]:
        for units in self.units.values():
            yield from units

    @meter.part("exchange")
    def gram(self, mix_RP: torch.Tensor, step: int) -> Gram:
        """Exchange slices, multiply them, sum the products over all ranks."""
        num_rows, blocks = len(mix_RP), len(self.layout.names)
        gram_BRX = mix_RP.new_zeros(blocks, num_rows, num_rows + 1)  # last: what is not finite
        partial: dict[str, list[tuple[int, torch.Tensor]]] = {kind: [] for kind in _PARTIAL}
        for unit in self.all_units():
            for row in self.buffers.present():
                _exchange(unit, row)
            if unit.remainder and dist.get_rank(unit.group) != 0:
                continue
            for segment in unit.segments:
                if segment.partial:
                    columns = slice(segment.start, segment.stop)
                    buffers_PN = self._buffers(unit, columns, mix_RP)
                    rows_RN = (mix_RP @ buffers_PN) * segment.count
                    partial[segment.partial].append((segment.block, rows_RN.float()))
                    gram_BRX[segment.block, :, -1] += not_finite(mix_RP, buffers_PN)
                elif segment.count:
                    self._multiply(unit, segment, mix_RP, gram_BRX)
        for kind, pending in partial.items():
            if pending:
                _multiply_partial(_PARTIAL[kind](), pending, gram_BRX)
        for ranks in (compat.data_group(), compat.model_group()):
            collectives.all_reduce(gram_BRX, ranks)
        finite_R = (gram_BRX[:, :, -1] == 0).all(0)
        return Gram(gram_BRX[:, :, :-1], finite_R, None)

    def combine(self, coefficients_BP: torch.Tensor) -> None:
        """The weighted sum of the slices: this rank's shard of the reduced gradient."""
        local = self.layout.row_map.local
        for unit in self.all_units():
            out_N = unit.out()
            for segment in by_block(unit.segments):
                scale_P = coefficients_BP[segment.block] * unit.scale
                for start in range(segment.start, segment.stop, _CHUNK // unit.ranks):
                    columns = slice(start, min(start + _CHUNK // unit.ranks, segment.stop))
                    total_N = torch.zeros(columns.stop - start, device=out_N.device)
                    for row in self.buffers.present():
                        scale_D = scale_P[unit.members * local + row].float()
                        total_N += scale_D @ unit.slices(row)[:, columns].float()
                    out_N[columns] = total_N.to(out_N.dtype)
            unit.gathered.clear()

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Let Megatron's finalize find the gradients reduced over data ranks."""
        groups = list(compat.bucket_groups(self.model))
        try:
            for group in groups:
                group.finish_grad_sync = functools.partial(self._finish, group)
            yield
        finally:
            for group in groups:
                del group.finish_grad_sync

    def _finish(self, group: BucketGroup, force_all_reduce: bool = False) -> None:
        """In place of a bucket group's own: what it does but for reducing."""
        group.param_gather_dispatched = False
        ddp = group.ddp_config
        if ddp.check_for_nan_in_grad or ddp.check_for_large_grads:
            group.check_grads(
                check_for_nan_or_inf=ddp.check_for_nan_in_grad,
                check_for_large=ddp.check_for_large_grads,
            )
        if force_all_reduce or not ddp.use_distributed_optimizer:
            for unit in self.units[id(group)]:
                if not unit.remainder and unit.ranks > 1:
                    whole, shard = unit.slices(0).view(-1), unit.out().clone()
                    dist.all_gather_into_tensor(whole, shard, group=unit.group)
        group.grad_reduce_finished = True

    def _buffers(self, unit: Unit, columns: slice, mix_RP: torch.Tensor) -> torch.Tensor:
        """Every group's buffers over some columns of the shard, in float64."""
        local = self.layout.row_map.local
        buffers_PN = mix_RP.new_zeros(mix_RP.shape[1], columns.stop - columns.start)
        for row in self.buffers.present():
            values_DN = unit.slices(row)[:, columns].double()
            buffers_PN.index_add_(0, unit.members * local + row, values_DN)
        return buffers_PN

    def _multiply(
        self, unit: Unit, segment: Segment, mix_RP: torch.Tensor, gram_BRX: torch.Tensor
    ) -> None:
        """gram[block] += mix G mix^T with G of the buffers over the segment's columns.

        G first: its diagonal also tells which buffers are finite, at no reading of their own.
        """
        size = mix_RP.shape[1]
        products_PP, width = mix_RP.new_zeros(size, size), max(1, _PRODUCT // size)
        for start in range(segment.start, segment.stop, width):
            columns = slice(start, min(start + width, segment.stop))
            buffers_PN = self._buffers(unit, columns, mix_RP)
            products_PP += buffers_PN @ buffers_PN.T
        bad_R = not_finite(mix_RP, products_PP.diagonal()[:, None])
        gram_BRX[segment.block, :, :-1] += segment.count**2 * (mix_RP @ products_PP @ mix_RP.T)
        gram_BRX[segment.block, :, -1] += bad_R


def _exchange(unit: Unit, row: int) -> None:
    """Fill the unit's slices of a local buffer. That of row 0 is Megatron's reduction, which is
    left out."""
    if unit.remainder:
        unit.gathered[row] = collectives.gathered(unit.whole(row)[None], unit.group)
        return
    if unit.ranks == 1:
        return
    slices_DN = unit.slices(row)
    for start in range(0, unit.columns, _CHUNK // unit.ranks):
        columns = slice(start, start + _CHUNK // unit.ranks)
        send = slices_DN[:, columns].contiguous()
        slices_DN[:, columns] = collectives.exchanged(send, unit.group, counted=row > 0)


def _multiply_partial(
    group: Any, pending: list[tuple[int, torch.Tensor]], gram_BRX: torch.Tensor
) -> None:
    """Sum partial rows over the ranks that have parts of them, then multiply on one of them."""
    together = torch.cat([rows_RN.flatten() for _, rows_RN in pending])
    collectives.all_reduce(together, group)
    if dist.get_rank(group) == 0:
        parts = together.split([rows_RN.numel() for _, rows_RN in pending])
        for (block, rows_RN), part in zip(pending, parts, strict=True):
            summed_RN = part.view_as(rows_RN).double()
            gram_BRX[block, :, :-1] += summed_RN @ summed_RN.T


def extra_bytes(gram: ExactGram) -> int:
    """What this rank will send in a step beyond Megatron's own reduction."""
    buffers, row_map = gram.buffers, gram.layout.row_map
    vectors = row_map.num_vectors
    slot_bytes = torch.empty([], dtype=buffers.slot_dtype).element_size()
    sent = 0
    for unit in gram.all_units():
        numel = unit.ranks * unit.columns
        main = buffers.flat(0, unit.buffer).element_size()
        extra = (row_map.slots - 1) * slot_bytes + row_map.num_targets * main
        sent += collectives.scatter_bytes(numel * (extra + main * unit.remainder), unit.ranks)
    for kind, ranks in _PARTIAL.items():
        columns = sum(s.stop - s.start for u in gram.all_units() for s in u.segments
                      if s.partial == kind)  # fmt: skip
        if columns:
            sent += collectives.all_reduce_bytes(
                4 * columns * vectors, dist.get_world_size(ranks())
            )
    grams = 8 * len(gram.layout.names) * vectors * (vectors + 1)
    for group in (compat.data_group(), compat.model_group()):
        sent += collectives.all_reduce_bytes(grams, dist.get_world_size(group))
    return sent
