"""The buffer path's rows: gradients of roles and slots, each in a buffer of its own.

Row 0 is Megatron's own gradient buffer (`param.main_grad`), so that rank rows cost no memory and
the combined gradient is written where the optimizer will look for it. The other rows are:

    slots 1 .. S-1      (S - 1) x elements x bytes(slot dtype)
    the target          elements x bytes(main_grad)              (only when a target batch is used)

elements = trainable parameters of this rank. Routing a microbatch's gradient means binding
`param.main_grad` to a view of its row's buffer while that microbatch runs.
"""

from collections.abc import Sequence

import torch

from megatron_dr.mcore.ownership import OwnedParameter
from megatron_dr.projection import Sketch

CHUNK = 1 << 20  # elements that are sketched at a time: bounds the temporaries


class GradRows:
    """The S general slots and the target of one rank.

    Rows are numbered 0..S-1 for the slots and S for the target.
    """

    def __init__(
        self, owned: Sequence[OwnedParameter], num_slots: int, slot_dtype: torch.dtype
    ) -> None:
        self.owned = owned
        self.num_slots = num_slots
        self.slot_dtype = slot_dtype
        self._extra: dict[int, list[torch.Tensor]] = {}  # row -> one view per parameter
        self._storage: list[torch.Tensor] = []
        self._stock: list[torch.Tensor] = []
        for slot in range(1, num_slots):
            self._allocate(slot, slot_dtype)

    def _allocate(self, row: int, dtype: torch.dtype | None) -> None:
        """One flat buffer a row; dtype None: that of main_grad."""
        first = self.owned[0].parameter
        numel = sum(o.parameter.numel() for o in self.owned)
        flat = torch.zeros(numel, dtype=dtype or first.main_grad.dtype, device=first.device)
        sizes = [o.parameter.numel() for o in self.owned]
        parts = flat.split(sizes)
        self._extra[row] = [p.view(o.parameter.shape) for p, o in zip(parts, self.owned)]
        self._storage.append(flat)

    @property
    def target(self) -> int:
        """The target's row number."""
        return self.num_slots

    @property
    def extra_bytes(self) -> int:
        """Bytes of the buffers beside Megatron's own."""
        return sum(s.numel() * s.element_size() for s in self._storage)

    def begin_step(self, with_target: bool) -> None:
        """Zero the rows (Megatron has zeroed its own) and remember Megatron's views."""
        if with_target and self.target not in self._extra:
            self._allocate(self.target, None)
        for flat in self._storage:
            flat.zero_()
        self._stock = [o.parameter.main_grad for o in self.owned]

    def view(self, row: int, number: int) -> torch.Tensor:
        """Gradient of parameter `number` in a row, in the parameter's shape."""
        return self._stock[number] if row == 0 else self._extra[row][number]

    def bind(self, row: int, chunk: int | None = None) -> None:
        """Let gradients of a model chunk (None: all) accumulate in a row."""
        for number, o in enumerate(self.owned):
            if chunk is None or o.chunk == chunk:
                o.parameter.main_grad = self.view(row, number)

    def end_step(self) -> None:
        """Bind Megatron's own views back and hold none of them. Safe to call twice."""
        if self._stock:
            self.bind(0)
            self._stock = []

    def sketch_(
        self, out_BRK: torch.Tensor, sketch: Sketch, blocks: Sequence[int], with_target: bool
    ) -> None:
        """out[b, r] += S g_r, for this rank's pieces, each counted as `ownership` says."""
        rows = range(self.num_slots + int(with_target))
        for number, o in enumerate(self.owned):
            if o.count == 0.0:
                continue
            flat = [self.view(r, number).view(-1) for r in rows]
            for start in range(0, o.parameter.numel(), CHUNK):
                stop = min(start + CHUNK, o.parameter.numel())
                values_RN = [f[start:stop] for f in flat]
                if o.count != 1.0:
                    values_RN = [v * o.count for v in values_RN]
                index_N = o.global_index(start, stop)
                sketch.add_(out_BRK[blocks[number], : len(flat)], values_RN, index_N, o.key)

    def combine_(self, coefficients_BR: torch.Tensor, blocks: Sequence[int]) -> None:
        """Megatron's buffer <- sum over rows r of coefficients[b, r] * row r, in place, locally.

        Every rank combines the partial gradients that it has: sums over data, tensor and pipeline
        ranks that Megatron does afterwards are linear, so nothing is counted twice.
        """
        for number in range(len(self.owned)):
            scale_R = coefficients_BR[blocks[number]]
            out = self.view(0, number)
            out.mul_(scale_R[0].to(out.dtype))
            for row in range(1, coefficients_BR.shape[1]):
                out.addcmul_(self.view(row, number).to(out.dtype), scale_R[row].to(out.dtype))
