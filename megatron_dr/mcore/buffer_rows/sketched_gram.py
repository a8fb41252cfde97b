"""The gram from sketches: rows stay where they are, K numbers per block and row cross the wire.

Sketches sum over data ranks; grams sum over parameter shards. A block's sketch is the sum over all
ranks that hold a piece of it, so the gram does not depend on the layout.

    wire, per rank    2 (m - 1)/m 4 B L K + (D - 1) 4 ceil(B/m) L K + 2 (m - 1)/m 8 B R (R + 2)

Legend: B blocks, L buffers of a rank, P vectors of all ranks (`row_map.py`), R rows and target, K
sketch size, D data x context ranks, m tensor x pipeline ranks.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from megatron_dr.mcore import collectives, compat, constants, meter
from megatron_dr.mcore.buffer_rows import levels
from megatron_dr.mcore.buffer_rows.buffers import Buffers
from megatron_dr.mcore.buffer_rows.layout import Gram, Layout, not_finite
from megatron_dr.mcore.buffer_rows.levels import Sent
from megatron_dr.mcore.compat import Chunk
from megatron_dr.projection import CountSketch, gram_and_error


class SketchedGram:
    """Grams by CountSketch; combined rows are left for Megatron to reduce.

    Attributes:
        size: K.
    """

    def __init__(self, buffers: Buffers, layout: Layout, size: int, seed: int) -> None:
        self.buffers, self.layout, self.size, self.seed = buffers, layout, size, seed

    @property
    def target_bytes(self) -> int:
        """What this rank keeps of the target in a step."""
        return self.buffers.target_bytes

    def step(self, num_target: int) -> AbstractContextManager[None]:
        """Nothing is sent before the backward is over."""
        return nullcontext()

    def backward(self, chunk: int, row: int, last: bool) -> None:
        """Buffers wait where they are."""

    def gram(self, mix_RP: torch.Tensor, step: int, apart: bool = False) -> Gram:
        """Sketch, exchange, multiply. Every step has its own sketch, the same on every rank.

        Args:
            apart: whether good rows' products stay finite beside bad rows.
        """
        sketch = CountSketch(self.size, self.seed * 1_000_003 + step)
        shape = (len(self.layout.names), self.layout.row_map.local, self.size)
        local_BLK = torch.zeros(shape, device=mix_RP.device)
        with meter.part("sketch"):
            self.buffers.sketch_(local_BLK, sketch, self.layout.blocks)
        return self._exchange(local_BLK, mix_RP, apart)

    def combine(self, coefficients_BP: torch.Tensor, left_out_P: torch.Tensor | None) -> None:
        """This rank's share of the update into Megatron's buffer.

        Args:
            left_out_P: vectors that have no part, whatever they hold.
        """
        row_map = self.layout.row_map
        vectors = [row_map.vector(self.layout.group, row) for row in range(row_map.local)]
        mine = constants.index(vectors, coefficients_BP.device)
        if left_out_P is not None:
            self.buffers.clear_(left_out_P[mine])
        self.buffers.combine_(coefficients_BP[:, mine], self.layout.blocks)

    def reduced(self) -> AbstractContextManager[None]:
        """Megatron's finalize reduces what was combined."""
        return nullcontext()

    @meter.part("exchange")
    def _exchange(self, local_BLK: torch.Tensor, mix_RP: torch.Tensor, apart: bool) -> Gram:
        """Local sketches -> the gram of all rows on every rank."""
        model_group, data_group = compat.model_group(), compat.data_group()
        collectives.all_reduce(local_BLK, model_group)
        own = self.layout.own_blocks()
        mine_bLK = local_BLK[own]
        gathered = collectives.gathered(mine_bLK[None], data_group)
        groups_GbLK = gathered.unflatten(0, (-1, self.layout.row_map.ranks)).sum(1)
        buffers_bPK = self.layout.row_map.summed(groups_GbLK.transpose(1, 2)).transpose(0, 1)
        num_rows, blocks = len(mix_RP), len(local_BLK)
        products_BRX = mix_RP.new_zeros(blocks, num_rows, num_rows + 2)
        products_BRX[own, :, -2] = not_finite(mix_RP, buffers_bPK)
        if apart:  # 0 times NaN would be NaN
            good_bP1 = buffers_bPK.isfinite().all(-1, keepdim=True)
            buffers_bPK = torch.where(good_bP1, buffers_bPK, 0.0)
        gram_bRR, error_b = gram_and_error(mix_RP.to(buffers_bPK.dtype) @ buffers_bPK)
        products_BRX[own, :, :-2] = gram_bRR
        products_BRX[own, :, -1] = error_b[:, None]
        collectives.all_reduce(products_BRX, model_group)
        finite_R = (products_BRX[:, :, -2] == 0).all(0)
        return Gram(products_BRX[:, :, :-2], finite_R, products_BRX[:, 0, -1])


def exposed(model: list[Chunk], layout: Layout, size: int) -> Sent:
    """What this rank sends in a step when its backward is over, Megatron's reduction included:
    that waits for the combined rows."""
    row_map = layout.row_map
    blocks, each = (
        len(layout.names),
        -(-len(layout.names) // dist.get_world_size(compat.model_group())),
    )
    row = 4 * row_map.local * size
    sent = Sent()
    for group in compat.bucket_groups(model):
        peers, sharded = compat.peers(group), group.ddp_config.use_distributed_optimizer
        for bucket in group.buckets:
            whole = bucket.grad_data.nbytes
            sent += levels.reduced(whole, peers.instance)
            shard = whole / dist.get_world_size(peers.instance)
            sent += levels.all_reduced(shard, peers.copies)
            sent += Sent() if sharded else levels.reduced(whole, peers.all)
    vectors = row_map.num_vectors
    grams = 8 * blocks * vectors * (vectors + 2)
    sent += levels.all_reduced(blocks * row + grams, compat.model_group())
    data = compat.data_group()
    return sent + levels.reduced(dist.get_world_size(data) * each * row, data)
