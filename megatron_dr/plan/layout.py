"""How a model lies on ranks.

Ranks are numbered as Megatron does by default, tensor, context, data and pipeline from the fastest
on (`core/parallel_state.py`, order tp-cp-ep-dp-pp). One rank stands for all those of its pipeline
stage: the first.
"""

from collections.abc import Callable
from dataclasses import dataclass

Ranks = tuple[int, ...]
Place = Callable[[int], int]  # which node, or row group, a rank belongs to


@dataclass(frozen=True)
class Layout:
    """Parallel sizes and what Megatron does with gradients.

    Attributes:
        dp, tp, cp, ep: data, tensor, context and expert parallel sizes.
        etp: expert-tensor parallel size; 0: as tp.
        pp, vpp: pipeline stages, and model chunks of each.
        distributed_optimizer, overlap, overlap_gather: --use-distributed-optimizer,
            --overlap-grad-reduce, --overlap-param-gather.
        weight_bytes, gradient_bytes: of an element.
        bucket: elements of a bucket; 0: Megatron's default.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 0
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    overlap: bool = True
    overlap_gather: bool = True
    weight_bytes: int = 2
    gradient_bytes: int = 4
    bucket: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "etp", self.etp or self.tp)

    @property
    def data(self) -> int:
        """D: ranks that hold the same piece of the dense layers, data x context."""
        return self.dp * self.cp

    @property
    def world(self) -> int:
        return self.tp * self.data * self.pp

    @property
    def own_expert_group(self) -> bool:
        """Whether experts have a gradient buffer of their own (`core/tensor_parallel/layers.py`,
        use_expert_pgs)."""
        return self.ep > 1 or self.etp != self.tp

    def layers_of_a_chunk(self, layers: int) -> int:
        """Of so many (`core/transformer/transformer_block.py`, get_num_layers_to_build).

        Raises:
            ValueError: they can't be dealt out evenly.
        """
        if layers % (self.pp * self.vpp):
            raise ValueError(
                f"{layers} layers can't be dealt out to {self.pp} pipeline stages of {self.vpp} "
                "chunks each: change one of them."
            )
        return layers // (self.pp * self.vpp)

    # -- groups ----------------------------------------------------------------------------------
    def data_group(self, stage: int) -> Ranks:
        first = stage * self.tp * self.data
        return tuple(range(first, first + self.tp * self.data, self.tp))

    def expert_group(self, stage: int) -> Ranks:
        """Ranks that hold the same experts."""
        first = stage * self.tp * self.data
        return tuple(range(first, first + self.tp * self.data, self.ep * self.etp))

    def tensor_group(self, stage: int) -> Ranks:
        first = stage * self.tp * self.data
        return tuple(range(first, first + self.tp))

    def embedding_group(self) -> Ranks:
        """The first and last stage."""
        return self.data_group(0)[0], self.data_group(self.pp - 1)[0]

    def model_group(self) -> Ranks:
        """Ranks that together hold one copy of the model."""
        return tuple(rank for stage in range(self.pp) for rank in self.tensor_group(stage))

    def data_rank(self, rank: int) -> int:
        """A rank's place among the data x context ranks."""
        return rank // self.tp % self.data
