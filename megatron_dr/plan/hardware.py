"""What a GPU and its links do in a second."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

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
        reserved: bytes of memory that a run's tensors can't have: CUDA's context, NCCL's buffers,
            what the allocator loses.
        overlaps: whether collectives run beside computation; of ranks that are CPU processes a
            core does both, one after the other.
    """

    node: int
    memory: float
    memory_bandwidth: float
    inside: Link
    between: Link
    flops: float
    fp32: float
    solve: float
    reserved: float = 0.0
    overlaps: bool = True

    @property
    def usable(self) -> float:
        """Bytes for a run's tensors."""
        return self.memory - self.reserved

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
    between=Link(45e9, 8e-6), flops=450e12, fp32=40e12, solve=3e-3, reserved=5e9,
)  # fmt: skip
# The same with HBM3e: 141 GB, 4.8 TB/s.
H200 = dataclasses.replace(H100, memory=141e9, memory_bandwidth=3.9e12)
# NVLink 5 (900 GB/s a way), HBM3e of 8 TB/s, 2,250 TFLOP/s in bf16 and 80 in fp32.
B200 = dataclasses.replace(
    H100, memory=180e9, memory_bandwidth=6.4e12, inside=Link(700e9, 3e-6), flops=1000e12, fp32=48e12
)
KNOWN = {"h100": H100, "h200": H200, "b200": B200}


def parse(table: Any) -> Hardware:
    """Hardware of names and numbers, as a file has them; what it leaves out is an H100's.

    Raises:
        ValueError: a name that there is not, a value that is no number, GPUs of a node that are no
            whole number, or more reserved than there is memory.
    """
    names = [field.name for field in dataclasses.fields(Hardware)]
    if not isinstance(table, dict):
        raise ValueError(f"hardware must be names and numbers ({', '.join(names)}).")
    found: dict[str, Any] = {}
    for name, value in table.items():
        if name not in names:
            raise ValueError(f"{name!r} is none of the hardware's names: {', '.join(names)}.")
        if name in ("inside", "between"):
            found[name] = _link(name, value, getattr(H100, name))
        elif name == "overlaps":
            if not isinstance(value, bool):
                raise ValueError(f"overlaps must be true or false, not {value!r}.")
            found[name] = value
        else:
            found[name] = _number(name, value)
    if "node" in found:
        if found["node"] % 1:
            raise ValueError(f"node must be a whole number of GPUs, not {table['node']!r}.")
        found["node"] = int(found["node"])
    hardware = dataclasses.replace(H100, **found)
    if hardware.reserved >= hardware.memory:
        raise ValueError(
            f"reserved, {hardware.reserved:.4g} bytes, must be less than memory, "
            f"{hardware.memory:.4g}: change one of them."
        )
    return hardware


def _link(name: str, table: Any, default: Link) -> Link:
    if not isinstance(table, dict) or table.keys() - {"bandwidth", "latency"}:
        raise ValueError(f"{name} must have bandwidth and latency, not {table!r}.")
    return dataclasses.replace(default, **{k: _number(f"{name}.{k}", v) for k, v in table.items()})


def _number(name: str, value: Any) -> float:
    """YAML reads 80e9 as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    zero = name in ("solve", "reserved") or name.endswith("latency")
    if not (number > 0 or (zero and number == 0)) or math.isinf(number):
        least = "of 0 or more" if zero else "above 0"
        raise ValueError(f"{name} must be a number {least}, not {value!r}.")
    return number
