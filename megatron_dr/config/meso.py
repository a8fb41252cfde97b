"""MeSO's configuration: the size of the compressed space and how often it is renewed."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag


@dataclass(frozen=True)
class MesoConfig:
    """The optimizer's moments in a compressed space (`optim/meso.py`).

    Raises:
        ValueError: a size or an interval out of range.
    """

    size: int = flag(
        512,
        "K: a matrix [O, I] has moments [min(K, O), min(K, I)]; switches MeSO on, in the form of "
        "--optimizer (adam or sgd)",
        "elements",
    )
    refresh: int = flag(200, "steps between two random subspaces; 0: one for ever", "steps")

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"MeSO's size must be at least 1, not {self.size}.")
        if self.refresh < 0:
            raise ValueError(f"MeSO's refresh must be at least 0, not {self.refresh}.")
