"""The same rows in every layout: sequences are named by (role, step, row, number)."""

from dataclasses import dataclass

import torch
from torch.utils.data import default_collate

from megatron_dr.data import packing
from megatron_dr.data.sample import Part

VOCAB, LENGTH, ROWS, TARGETS = 61, 8, 4, 4
SET_WEIGHTS = (0.7, 0.3)
PACK = 3 * LENGTH + 2


@dataclass(frozen=True)
class Layout:
    """A way to lay the model and the batch over ranks. M = 4 rows in each."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    overlap_param_gather: bool = False
    per_token: bool = False
    tied: bool = False
    moe: bool = False
    bf16: bool = False
    recompute: bool = False
    qk_layernorm: bool = False
    layer_norm: bool = False  # LayerNorm, biases, GELU instead of RMSNorm, no biases, SwiGLU
    fused_gradients: bool = False
    sequences: int = 2  # general sequences (microbatches of one) in a row
    targets: int = TARGETS
    full_masks: bool = False
    target_ranks: int = 0  # that run only target microbatches; the others are a row each
    packed: bool = False  # sample rows: a microbatch is one pack of PACK tokens
    domains: int = 0  # sequence n of row r is of domain (r + n) % domains
    frozen: tuple[int, ...] = ()  # layers that are not trained; with the first, the embedding too
    dropout: float = 0.0
    row_ranks: int = 0  # data x context ranks that are asked to make one row
    instances: int = 1  # of the distributed optimizer; each is a row unless row_ranks says else
    average: bool = False  # the collective averages
    bf16_buffers: bool = False
    target_sets: tuple[int, ...] = ()  # target n is of set target_sets[n % len], of SET_WEIGHTS
    maximin: bool = False  # of the two target sets

    @property
    def alone(self) -> "Layout":
        """The same model and data with nothing parallel but what makes rows: the oracle's."""
        same = ("per_token", "tied", "moe", "qk_layernorm", "layer_norm", "sequences", "targets",
                "full_masks", "target_ranks", "packed", "domains", "frozen",
                "target_sets", "maximin")  # fmt: skip
        dp = self.dp if self.target_ranks else 1
        return Layout(**{name: getattr(self, name) for name in same}, dp=dp)

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained."""
        layers = tuple(f"decoder.layers.{n}." for n in self.frozen)
        return not name.startswith(layers + ("embedding",) * (0 in self.frozen))

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def dp_per_row(self) -> int:
        """Data-parallel ranks that form one row: expert-parallel peers do, and who is asked to."""
        asked = self.row_ranks // self.cp
        if self.instances > 1 and not asked and not self.domains:
            asked = self.dp // self.instances
        return max(1, self.ep * self.etp // (self.tp * self.cp), asked)

    @property
    def rows(self) -> int:
        """M, but for domain rows."""
        return self.dp - self.target_ranks if self.target_ranks else ROWS

    @property
    def slots(self) -> int:
        if self.target_ranks:
            return 1
        return ROWS * self.dp_per_row // self.dp

    @property
    def num_general(self) -> int:
        return self.slots * self.sequences // self.dp_per_row

    @property
    def num_target(self) -> int:
        return self.targets // (self.target_ranks or self.dp)


Sequence = dict[str, torch.Tensor]


def sequence(role: str, step: int, row: int, number: int, full_mask: bool) -> Sequence:
    """Tokens, labels and loss mask [LENGTH] of one sequence."""
    seed = hash((role == "target", step, row, number)) % 2**31
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, VOCAB, (LENGTH + 1,), generator=generator)
    mask = torch.ones(LENGTH)
    if not full_mask:
        mask[torch.randint(1, LENGTH, (1,), generator=generator) :] = 0.0
    return {
        "tokens": text[:-1],
        "labels": text[1:],
        "loss_mask": mask,
        "position_ids": torch.arange(LENGTH),
    }


def pack(batch: Sequence) -> Sequence:
    """The pack [1, PACK] of a batch's sequences, each cut after its last label with a loss."""
    parts = []
    for tokens, labels, mask in zip(
        batch["tokens"], batch["labels"], batch["loss_mask"], strict=True
    ):
        length = int(mask.sum())
        ids = [*tokens[:length].tolist(), int(labels[length - 1])]
        parts.append(Part.of(ids, [1] * len(ids)))
    return default_collate([packing.pack(parts, PACK, pad=0)])


def general(layout: Layout, step: int, dp_rank: int) -> list[dict[str, torch.Tensor]]:
    """A rank's general microbatches in order: slot by slot, its share of each row's sequences."""
    group, peer = divmod(dp_rank - layout.target_ranks, layout.dp_per_row)
    batches = []
    for slot in range(layout.slots):
        row = group * layout.slots + slot
        for number in range(peer, layout.sequences, layout.dp_per_row):
            batches.append(sequence("general", step, row, number, layout.full_masks))
    return batches


def domains(layout: Layout, dp_rank: int) -> list[int]:
    """Domain of each of a rank's general microbatches."""
    group, peer = divmod(dp_rank, layout.dp_per_row)
    return [
        (group * layout.slots + slot + number) % layout.domains
        for slot in range(layout.slots)
        for number in range(peer, layout.sequences, layout.dp_per_row)
    ]


def target(layout: Layout, step: int, dp_rank: int) -> list[dict[str, torch.Tensor]]:
    first = dp_rank * layout.num_target
    numbers = range(first, first + layout.num_target)
    return [sequence("target", step, 0, n, layout.full_masks) for n in numbers]
