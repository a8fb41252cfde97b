"""Configuration of what is read with domain rows: how far a corpus's share follows its weight."""

from dataclasses import dataclass

from megatron_dr.config.fields import flag, must_be

LEAST = 0.1  # LOW where HIGH alone is given


@dataclass(frozen=True)
class DomainConfig:
    """Shares of the corpora that follow their rows' weights (`data/domain_shares.py`).

    Raises:
        ValueError: bounds that don't hold what is given, or no interval.
    """

    sampling: str = flag(
        f"{LEAST},4",
        "with domain rows, read a corpus as much as its row's averaged weight says, between LOW "
        "and HIGH times its weight in the blend; LOW,HIGH, or HIGH alone with a LOW of "
        f"{LEAST}",
        "factors, 0 <= LOW <= 1 <= HIGH",
    )
    interval: int = flag(
        20,
        "steps that shares are kept for, that weights are averaged over, and by which shares come "
        "after their weights",
        "steps",
    )

    def __post_init__(self) -> None:
        must_be("at least 1", self.interval >= 1, "the domains' interval", self.interval)
        try:
            fits = 0.0 <= self.low <= 1.0 <= self.high < float("inf")
        except ValueError:
            fits = False
        says = f"LOW,HIGH with 0 <= LOW <= 1 <= HIGH, as {LEAST},4, or HIGH alone"
        must_be(says, fits, "the domains' sampling", self.sampling)

    @property
    def low(self) -> float:
        """Least share of a corpus, as a factor of its given one."""
        low, comma, _ = str(self.sampling).partition(",")
        return float(low) if comma else LEAST

    @property
    def high(self) -> float:
        """Largest share, likewise."""
        first, comma, high = str(self.sampling).partition(",")
        return float(high if comma else first)
