"""The buffer path's rows: gradients of roles and slots, each in a buffer of its own.

Row buffer 0 is Megatron's own gradient buffer, so that rank rows cost no memory and the combined
gradient is written where the optimizer will look for it. The others have the same layout:

    slots 1 .. S-1      (S - 1) x elements x bytes(slot dtype)
    the target          elements x bytes(main_grad), twice where it is kept in halves; none where
                        the gram is exact: the target then has Megatron's buffer until its last
                        backward, when what it needs of it is exchanged (`exchange.py`)

elements = trainable parameters of this rank and the padding of Megatron's buckets. Routing a
microbatch's gradient means binding `param.main_grad` to a view of its row's buffer while that
microbatch runs.

Legend: B blocks, L = S + target buffers of this rank, N elements, K sketch size.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dr.mcore import compat
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.mcore.ownership import OwnedParameter
from megatron_dr.projection import CountSketch

CHUNK = 1 << 20  # elements that are sketched at a time: bounds the temporaries


@dataclass(frozen=True)
class Piece:
    """A parameter's elements [start, stop) in one of Megatron's buffers."""

    number: int
    buffer: int
    start: int
    stop: int


class Buffers:
    """The S general slots and the target of one rank.

    Local buffers are numbered 0..S-1 for the slots and S, S + 1 for the target's.

    Attributes:
        buffers: Megatron's gradient buffers, of all chunks, dense ones first.
        pieces: where each owned parameter lies, in the order of `owned`.
        own_target: whether the target has buffers of its own, or Megatron's before slot 0 has it.
    """

    def __init__(
        self, owned: Sequence[OwnedParameter], model: Sequence[Any], row_map: RowMap,
        slot_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.owned, self.row_map, self.slot_dtype = owned, row_map, slot_dtype
        self.buffers = compat.grad_buffers(model)
        self.device = compat.device()  # a stage may have no gradients at all
        number = {id(o.parameter): n for n, o in enumerate(owned)}
        places = {
            number[id(parameter)]: Piece(number[id(parameter)], j, start, stop)
            for j, buffer in enumerate(self.buffers)
            for parameter, (start, stop, _) in buffer.param_index_map.items()
        }
        self.pieces = [places[n] for n in range(len(owned))]
        self.own_target = True
        self._extra: dict[int, list[torch.Tensor]] = {}  # local buffer -> flat, per Megatron buffer
        self._is_bound = False  # whether views other than Megatron's own may be
        self.restore()

    def _allocate(self, rows: range, dtype: torch.dtype | None) -> None:
        """Those that are missing. dtype None: that of main_grad."""
        grads = [b.grad_data for b in self.buffers]
        for row in rows:
            if row not in self._extra:
                self._extra[row] = [torch.zeros_like(grad, dtype=dtype) for grad in grads]

    @property
    def extra_bytes(self) -> int:
        """Bytes of the buffers beside Megatron's own."""
        return sum(flat.nbytes for flats in self._extra.values() for flat in flats)

    @property
    def target_bytes(self) -> int:
        """Bytes of the target's own buffers, allocated with the first target batch."""
        each: int = sum(b.grad_data.nbytes for b in self.buffers)
        return self.row_map.num_targets * each

    def begin_step(self, with_target: bool) -> None:
        """Zero the rows; Megatron has zeroed its own."""
        self.restore()
        if with_target and self.own_target:
            self._allocate(range(self.row_map.slots, self.row_map.local), None)
        for flats in self._extra.values():
            for flat in flats:
                flat.zero_()

    def flat(self, row: int, buffer: int) -> torch.Tensor:
        """A local buffer's copy of one of Megatron's buffers [elements]."""
        if row == 0 or (row >= self.row_map.slots and not self.own_target):
            grads: torch.Tensor = self.buffers[buffer].grad_data
            return grads
        return self._extra[row][buffer]

    def view(self, row: int, number: int) -> torch.Tensor:
        """Gradient of parameter `number` in a local buffer, in the parameter's shape."""
        piece = self.pieces[number]
        flat = self.flat(row, piece.buffer)[piece.start : piece.stop]
        return flat.view(self.owned[number].parameter.shape)

    def bind(self, row: int, chunk: int | None = None) -> None:
        """Let gradients of a model chunk (None: all) accumulate in a local buffer."""
        self._is_bound = row != 0 or chunk is not None
        for number, o in enumerate(self.owned):
            if chunk is None or o.chunk == chunk:
                o.parameter.main_grad = self.view(row, number)  # type: ignore[attr-defined]

    def end_step(self) -> None:
        """Bind Megatron's own views back. Safe to call twice, also while their memory is freed."""
        if self._is_bound:
            self.bind(0)

    def offload(self) -> int:
        """Free the buffers beside Megatron's own; how many bytes they were. Safe to call twice.

        Nothing is kept elsewhere: every step begins with zeros.
        """
        freed = self.extra_bytes
        self._extra.clear()
        return freed

    def restore(self) -> None:
        """Allocate the slots that are missing; the target's buffers come with its next batch."""
        self._allocate(range(1, self.row_map.slots), self.slot_dtype)

    def present(self) -> list[int]:
        """Local buffers that hold something: the target's only once it was used."""
        return [row for row in range(self.row_map.local) if row == 0 or row in self._extra]

    def sketch_(self, out_BLK: torch.Tensor, sketch: CountSketch, blocks: Sequence[int]) -> None:
        """out[b, l] += S g_l, for this rank's pieces, each counted as `ownership` says."""
        present = self.present()
        for number, o in enumerate(self.owned):
            if o.count == 0.0:
                continue
            flat = [self.view(row, number).view(-1) for row in present]
            for start in range(0, o.parameter.numel(), CHUNK):
                stop = min(start + CHUNK, o.parameter.numel())
                values_LN = [f[start:stop] for f in flat]
                if o.count != 1.0:
                    values_LN = [v * o.count for v in values_LN]
                index_N = o.global_index(start, stop)
                sketch.add_(out_BLK[blocks[number], : len(flat)], values_LN, index_N, o.key)

    def clear_(self, left_out_L: torch.Tensor) -> None:
        """Zero local buffers, in place: what is multiplied by 0 may be NaN."""
        for row in self.present():
            for buffer in range(len(self.buffers)):
                self.flat(row, buffer).masked_fill_(left_out_L[row], 0.0)

    def combine_(self, coefficients_BL: torch.Tensor, blocks: Sequence[int]) -> None:
        """Megatron's buffer <- sum over local buffers l of coefficients[b, l] * l, in place.

        Every rank combines the partial gradients that it has: sums over data, tensor and pipeline
        ranks that Megatron does afterwards are linear, so nothing is counted twice.
        """
        present = self.present()
        for buffer, start, stop, block in self.spans(blocks):
            scale_L = coefficients_BL[block]
            out = self.flat(0, buffer)[start:stop]
            out.mul_(scale_L[0].to(out.dtype))
            for row in present[1:]:
                values = self.flat(row, buffer)[start:stop]
                out.addcmul_(values.to(out.dtype), scale_L[row].to(out.dtype))

    def spans(self, blocks: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
        """(buffer, start, stop, block): neighbours of one block are joined, padding included."""
        ordered = sorted(self.pieces, key=lambda p: (p.buffer, p.start))
        alike = itertools.groupby(ordered, lambda p: (p.buffer, blocks[p.number]))
        for (buffer, block), run in alike:
            pieces = list(run)
            yield buffer, pieces[0].start, pieces[-1].stop, block
