"""Bytes that a rank sends in a collective, by the algorithms that move least.

n ranks, a payload of so many bytes: an all-reduce's vector, the whole vector of a reduce-scatter,
all-gather or all-to-all.
"""


def all_reduce(num_bytes: int, ranks: int) -> int:
    """2 (n - 1)/n: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) * num_bytes // ranks


def scatter(num_bytes: int, ranks: int) -> int:
    """(n - 1)/n: of a reduce-scatter, an all-gather, an all-to-all."""
    return (ranks - 1) * num_bytes // ranks
