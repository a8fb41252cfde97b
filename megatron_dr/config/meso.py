"""MeSO's configuration: the size of the compressed space and how often it is renewed."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be


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
        must_be("at least 1", self.size >= 1, "MeSO's size", self.size)
        must_be("at least 0", self.refresh >= 0, "MeSO's refresh", self.refresh)
