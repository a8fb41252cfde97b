"""What a rank sends in a step of `step_arms.py`: every collective passes torch's dispatcher, and is
priced by the algorithms that move least (`megatron_dr/mcore/collectives.py`)."""

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dr.mcore import collectives


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank sends; the collectives still run.

    Between nodes a reduction of n ranks on N nodes counts as a hierarchical one: 1 / (n / N) of the
    bytes, times (N - 1)/N for each of its halves; an all-to-all sends to each rank what is its.

    Args:
        node: neighbouring ranks of a node.

    Raises:
        RuntimeError: a collective whose price is not in the table.
    """

    # which argument is the payload, and its price
    PRICES = {
        "allreduce_": (0, collectives.all_reduce_bytes),
        "_reduce_scatter_base_": (1, collectives.scatter_bytes),
        "reduce_scatter_tensor_coalesced_": (1, collectives.scatter_bytes),
        "_allgather_base_": (0, collectives.scatter_bytes),
        "allgather_into_tensor_coalesced_": (0, collectives.scatter_bytes),
        "alltoall_base_": (1, collectives.scatter_bytes),
    }

    def __init__(self, node: int) -> None:
        super().__init__()
        self.node, self.bytes, self.between, self.early = node, 0, 0.0, 0

    def backward_over(self) -> None:
        """What was sent until now was sent in the backward: the first call tells."""
        self.early = self.early or self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in self.PRICES:
                raise RuntimeError(f"no price for the collective {name}: add it to Sent.PRICES.")
            payload, price = self.PRICES[name]
            tensors = args[payload]
            tensors = [tensors] if isinstance(tensors, torch.Tensor) else tensors
            group = next(a for a in args if isinstance(a, torch.ScriptObject))
            members = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
            payload_bytes = sum(t.nbytes for t in tensors)
            self.bytes += price(payload_bytes, len(members))
            nodes = len({rank // self.node for rank in members})
            share = 1 if name == "alltoall_base_" else len(members) // nodes
            self.between += price(payload_bytes, nodes) / share
        return func(*args, **(kwargs or {}))
