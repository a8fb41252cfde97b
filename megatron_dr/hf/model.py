"""What conversion needs to know of a model."""

from dataclasses import dataclass

from megatron_dr.hf.rope import Rope


@dataclass(frozen=True)
class Model:
    """A model's shape and choices, as the family table and Megatron's flags need them.

    Attributes:
        architecture: Hugging Face's class name.
        ffn_size: inner size of the gated MLP, of one expert where there are `experts`.
        window: length up to which attention is full; None: no limit.
        experts: number of experts, 0 for a dense model; `top_k` of them per token,
            `normalised`: their weights sum to 1.
    """

    architecture: str
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    groups: int
    head_size: int
    vocabulary: int
    positions: int
    epsilon: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    rope: Rope
    window: int | None = None
    experts: int = 0
    top_k: int = 0
    normalised: bool = True
