"""The exact gram, riding on the reduce-scatter.

A reduce-scatter sends (D - 1)/D of a buffer per rank; so does an exchange that leaves on each rank
every row's slice of its own shard (`route.py`). Those slices give the exact gram, which sums over
shards, and their weighted sum *is* the reduce-scatter's result. So Megatron's own reduction is left
out, and what a step sends beyond it is the further buffers of a rank (slots, target) and the grams.

Slices need no weights, so they travel when Megatron's reduction would (`exchange.py`), and each
range's products are added as it arrives. After the backward come the last bucket, the grams'
all-reduce, the solve and the local weighted sum.

Slices are kept in place: once sent, a rank's buffer is free to hold the slices that it received.
Beside it a rank keeps its shard of the target, the ranges that are travelling, and the grams.

Partial gradients are never multiplied: those that Megatron sums over tensor-parallel ranks (norms
under sequence parallelism) or between the first and last stage (a tied embedding) are summed first,
as the small tensors that they are. The combined gradient stays partial: Megatron sums it later.

Legend: B blocks, P vectors of all ranks (`row_map.py`), R rows and target, D ranks of a group, N
elements of a shard.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore import collectives, compat, constants, meter
from megatron_dr.mcore.buffer_rows import levels
from megatron_dr.mcore.buffer_rows.bad_rows import kept_apart
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.exchange import Exchange
from megatron_dr.mcore.buffer_rows.layout import Gram, Layout
from megatron_dr.mcore.buffer_rows.levels import Sent
from megatron_dr.mcore.buffer_rows.units import Segment, Unit, by_block, units_of
from megatron_dr.mcore.compat import BucketGroup, Chunk
from megatron_dr.projection import gram_of_long

# elements that are summed at a time, and columns: a sum that is not done yet stays in a GPU's cache
_CHUNK, _COLUMNS = 1 << 25, 1 << 22
# elements that are multiplied at a time: on the CPU what its caches hold, else what keeps it busy
_PRODUCT = {"cpu": 1 << 18, "cuda": 1 << 25}
_PARTIAL = {  # ranks whose partial gradients are summed first, by the kind of these
    "tensor": parallel_state.get_tensor_model_parallel_group,
    "embedding": parallel_state.get_embedding_group,
}


class ExactGram:
    """Grams of whole gradients; `combine` leaves the gradient reduced over data ranks."""

    def __init__(self, buffers: Buffers, layout: Layout, model: list[Chunk]) -> None:
        self.buffers, self.layout, self.model = buffers, layout, model
        self.units = units_of(model, buffers, layout)  # by bucket group
        self.exchange = Exchange(model, self.units, layout.row_map, buffers.device, self._multiply)
        self.backward, self.all_units = self.exchange.backward, self.exchange.all_units
        self._products_BPP = torch.empty(0)

    @property
    def target_bytes(self) -> int:
        """What this rank keeps of the target in a step: its shards."""
        return self.layout.row_map.num_targets * sum(
            len(unit.target.keys) * unit.whole(0)[0].nbytes for unit in self.all_units()
        )

    @contextmanager
    def step(self, num_target: int) -> Iterator[None]:
        """A step's gradients come to the buffers inside.

        Args:
            num_target: microbatches of the target. They may be fewer than its buffers, and one that
                none fills does not travel: it would take Megatron's, where slot 0 is by then.
        """
        row_map = self.layout.row_map
        vectors = row_map.num_sums
        self._products_BPP = torch.zeros(
            len(self.layout.names), vectors, vectors, dtype=torch.float64,
            device=self.buffers.device,
        )  # fmt: skip
        filled = min(num_target, row_map.num_targets)
        with self.exchange.step(range(row_map.slots + filled)):
            yield

    @meter.part("exchange")
    def gram(self, mix_RP: torch.Tensor, step: int, apart: bool = False) -> Gram:
        """Sum the products over all ranks, once all slices are here.

        Args:
            apart: whether good rows' products stay finite beside bad rows.
        """
        self.exchange.finish()
        self._multiply_partial()
        products_BPP = self._products_BPP
        bad_BP = ~products_BPP.diagonal(dim1=1, dim2=2).isfinite()
        products_BPP = kept_apart(products_BPP) if apart else products_BPP
        gram_BRX = torch.cat(
            [
                mix_RP @ products_BPP @ mix_RP.T,
                (bad_BP.to(mix_RP.dtype) @ (mix_RP != 0).to(mix_RP.dtype).T)[:, :, None],
            ],
            -1,
        )
        for ranks in (compat.data_group(), compat.model_group()):
            collectives.all_reduce(gram_BRX, ranks)
        finite_R = (gram_BRX[:, :, -1] == 0).all(0)
        return Gram(gram_BRX[:, :, :-1], finite_R, None)

    def combine(self, coefficients_BP: torch.Tensor, left_out_P: torch.Tensor | None) -> None:
        """The weighted sum of the slices: this rank's shard of the reduced gradient.

        Args:
            left_out_P: vectors that have no part, whatever they hold.
        """
        for unit in self.all_units():
            out_N = unit.out()
            for segment in by_block(unit.segments):
                scale_P = (coefficients_BP[segment.block] * unit.scale).float()
                width = min(_COLUMNS, _CHUNK // unit.ranks)
                for start in range(segment.start, segment.stop, width):
                    columns = slice(start, min(start + width, segment.stop))
                    total_N: torch.Tensor | None = None  # not in out_N, which is one of the slices
                    for row, held_RN in unit.held.items():
                        of_row = constants.index(unit.vectors(row), out_N.device)
                        held_RN = held_RN[:, columns].float()
                        if left_out_P is not None:  # 0 times NaN would be NaN
                            held_RN = held_RN.masked_fill(left_out_P[of_row, None], 0.0)
                        if total_N is None:
                            total_N = held_RN.T @ scale_P[of_row]
                        else:
                            total_N.addmv_(held_RN.T, scale_P[of_row])
                    out_N[columns] = 0.0 if total_N is None else total_N.to(out_N.dtype)

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
        for unit in self.units[id(group)]:
            unit.spread(force_all_reduce or not ddp.use_distributed_optimizer)
        group.grad_reduce_finished = True

    def _multiply(self, unit: Unit) -> None:
        """products[block] += G G^T, G the vectors over the unit's columns.

        The diagonal also tells which vectors are finite, at no reading of their own.
        """
        if unit.remainder and not unit.first:
            return
        width = max(1, _PRODUCT[self.buffers.device.type] // len(self._products_BPP[0]))
        vectors = [vector for row in unit.held for vector in unit.vectors(row)]
        index_P = constants.index(vectors, self.buffers.device)
        for segment in unit.segments:
            if segment.partial or not segment.count or not vectors:
                continue
            total_PP = torch.zeros(len(vectors), len(vectors), dtype=torch.float64,
                                   device=index_P.device)  # fmt: skip
            for start in range(segment.start, segment.stop, width):
                stop = min(start + width, segment.stop)
                held = [held_RN[:, start:stop].float() for held_RN in unit.held.values()]
                total_PP += gram_of_long(held)
            total_PP *= segment.count**2
            self._products_BPP[segment.block][index_P[:, None], index_P] += total_PP

    def _vectors(self, unit: Unit, segment: Segment) -> torch.Tensor:
        """Every vector over some columns of the shard, in float64."""
        columns = slice(segment.start, segment.stop)
        vectors_PN = torch.zeros(
            len(self._products_BPP[0]), segment.stop - segment.start, dtype=torch.float64,
            device=self.buffers.device,
        )  # fmt: skip
        for row, held_RN in unit.held.items():
            of_row = constants.index(unit.vectors(row), vectors_PN.device)
            vectors_PN[of_row] = held_RN[:, columns].double()
        return vectors_PN

    def _multiply_partial(self) -> None:
        """Partial rows are summed over the ranks that have parts of them, then multiplied on one.

        What is not finite stays so: its products are NaN.
        """
        for kind, ranks in _PARTIAL.items():
            pending = [
                (segment, self._vectors(unit, segment) * segment.count)
                for unit in self.all_units()
                if not unit.remainder or unit.first
                for segment in unit.segments
                if segment.partial == kind
            ]
            if not pending:
                continue
            together = torch.cat([vectors_PN.flatten() for _, vectors_PN in pending]).float()
            collectives.all_reduce(together, ranks())
            if dist.get_rank(ranks()) != 0:
                continue
            parts = together.split([vectors_PN.numel() for _, vectors_PN in pending])
            for (segment, vectors_PN), part in zip(pending, parts, strict=True):
                summed_PN = part.view_as(vectors_PN).double()
                self._products_BPP[segment.block].addmm_(summed_PN, summed_PN.T)


def exposed(gram: ExactGram) -> Sent:
    """What this rank sends in a step when its backward is over, Megatron's reduction included.

    The grams; the combined gradient, where others need this rank's shard; and of the exchange all,
    or where it is overlapped the bucket that is ready last, of the last general buffer.
    """
    buffers, row_map = gram.buffers, gram.layout.row_map
    everywhere = not gram.model[0].ddp_config.use_distributed_optimizer
    chunk = gram.model[0]  # whose backward ends last
    last = [*chunk.bucket_groups[-1:], *chunk.expert_parallel_bucket_groups[-1:]]
    late = {id(unit) for group in last for unit in gram.units[id(group)]}
    slot_bytes = torch.empty([], dtype=buffers.slot_dtype).element_size()
    sent = Sent()
    for unit in gram.all_units():
        main = unit.whole(0).element_size()
        of_rows = [main] + (row_map.slots - 1) * [slot_bytes] + row_map.num_targets * [main]
        exposed_rows: Sequence[int] = range(row_map.local)
        if gram.exchange.overlapped:
            exposed_rows = [row_map.slots - 1] if id(unit) in late else []
        for row in exposed_rows:
            sent += unit.sent(row, of_rows[row])
        sent += unit.spread_sent(main, everywhere)
    for kind, ranks in _PARTIAL.items():
        columns = sum(s.stop - s.start for u in gram.all_units() for s in u.segments
                      if s.partial == kind)  # fmt: skip
        if columns:
            sent += levels.all_reduced(4 * columns * row_map.num_sums, ranks())
    rows = row_map.num_vectors
    grams = 8 * len(gram.layout.names) * rows * (rows + 1)
    for group in (compat.data_group(), compat.model_group()):
        sent += levels.all_reduced(grams, group)
    return sent
