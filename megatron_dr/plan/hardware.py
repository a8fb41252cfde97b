"""What a GPU and its links do in a second."""

import math
from dataclasses import dataclass

from megatron_dr.plan import wire
from megatron_dr.plan.wire import Send


@dataclass(frozen=True)
class Link:
    """Bandwidth: bytes a second that a GPU sends. Latency: seconds of a message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Hardware:
    """Of one kind of GPU and network.

    Attributes:
        node: GPUs of a node.
        memory, memory_bandwidth: of a GPU, bytes and bytes a second.
        inside, between: links of a node, and between nodes.
        flops: that a GPU sustains in a layer's products, a second.
        fp32: that it sustains in products of fp32 without TF32, a second.
        solve: seconds of a solve for the weights.
    """

    node: int
    memory: float
    memory_bandwidth: float
    inside: Link
    between: Link
    flops: float
    fp32: float
    solve: float

    def seconds(self, send: Send) -> tuple[float, float]:
        """For which a collective holds the links inside a node, and between nodes.

        A ring takes n - 1 messages one after the other, as does an all-to-all; an all-reduce of
        something small goes up and down a tree.
        """
        n, nodes = len(send.group), len({rank // self.node for rank in send.group})
        inner, outer = wire.by_level([send], lambda rank: rank // self.node)
        hops = 2 * math.ceil(math.log2(n)) if send.kind == "reduce" else n - 1
        crossing = hops * (nodes / n if nodes > 1 else 0.0)
        return (
            inner / self.inside.bandwidth + (hops - crossing) * self.inside.latency,
            outer / self.between.bandwidth + crossing * self.between.latency,
        )

    def alone(self, sends: list[Send]) -> float:
        """One after the other, with nothing else under way."""
        return sum(max(self.seconds(send)) for send in sends)


# NVLink 4 (450 GB/s a way by data sheet), a 400 Gb/s card for each GPU (50 GB/s) and HBM3 (3.35
# TB/s), less what programs don't reach.
H100 = Hardware(
    node=8, memory=80e9, memory_bandwidth=2.7e12, inside=Link(350e9, 3e-6),
    between=Link(45e9, 8e-6), flops=450e12, fp32=40e12, solve=3e-3,
)  # fmt: skip
