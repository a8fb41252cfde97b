"""Which samples are for validation: chosen by content, so that no duplicate is on both sides."""

import hashlib

import numpy as np


def validation(contents: np.ndarray, wanted: float, seed: int) -> np.ndarray:
    """The samples that are for validation; bool [n].

    Contents are ordered by a hash of the seed and of themselves. In this order all samples of a
    content go to validation together, wherever they still fit in the number wanted.

    Args:
        contents: a hash of each sample's tokens, uint8 [n, 16].
        wanted: a number of samples, or below 1 a fraction of them.

    Raises:
        ValueError: a number that leaves no sample on one of the sides.
    """
    n = len(contents)
    size = round(wanted * n) if wanted < 1 else round(wanted)
    distinct, place, count = np.unique(
        contents.view("V16").ravel(), return_inverse=True, return_counts=True
    )
    key = seed.to_bytes(8, "little", signed=True)
    order = sorted(
        range(len(distinct)),
        key=lambda d: hashlib.blake2b(distinct[d].tobytes(), digest_size=16, key=key).digest(),
    )
    chosen, left = np.zeros(len(distinct), bool), size
    for d in order:
        if count[d] <= left:
            chosen[d] = True
            left -= int(count[d])
    side: np.ndarray = chosen[place.ravel()]
    if not side.any() or side.all():
        raise ValueError(
            f"--validation {wanted:g} leaves no sample for "
            f"{'validation' if not side.any() else 'training'}: of {n} samples {len(distinct)} "
            "are distinct, and equal ones stay together."
        )
    return side
