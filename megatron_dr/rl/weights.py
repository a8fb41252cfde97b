"""What each token counts in a mean, so that padding, packing and splits don't change it.

Shape suffixes: B completions, T tokens (right-padded).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Aggregation = Literal["token", "sequence"]


class TokenWeights(NamedTuple):
    """Weight and count of each token: a mean is sum(weight x loss) / sum(count).

    Both travel with their tokens: whatever moves the tokens (padding, packing, a split over data
    or context ranks) moves them with `map`, and the sums over all ranks stay what they were.

    Attributes:
        weight_BT: at least 0; 0 is padding, whose losses are never looked at.
        count_BT: integers.
    """

    weight_BT: Tensor
    count_BT: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> "TokenWeights":
        """The same after a move of the tokens, such as a slice or a padding with zeros."""
        return TokenWeights(move(self.weight_BT), move(self.count_BT))

    def keep(self, value_BT: Tensor) -> Tensor:
        """The values, 0 at padding: also their gradients are 0 there, whatever stood there."""
        return torch.where(self.weight_BT > 0, value_BT, torch.zeros_like(value_BT))

    def total(self, loss_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(sum, count): a scalar with a gradient, and an integer scalar."""
        return (self.weight_BT * loss_BT).sum(), self.count_BT.sum()


def token_weights(mask_BT: Tensor, aggregation: Aggregation) -> TokenWeights:
    """Weights of a mean over tokens, or of the mean over completions of their tokens' means.

        token:     sum_bt m_bt l_bt / sum_bt m_bt
        sequence:  sum_b (sum_t m_bt l_bt / sum_t m_bt) / #{b : sum_t m_bt > 0}

    GRPO's own form (arXiv 2402.03300, eq. 3) is `sequence`; the token mean is DAPO's
    (arXiv 2503.14476). A completion without tokens counts in neither.

    Args:
        mask_BT: 1 at a completion's tokens, 0 elsewhere.

    Raises:
        ValueError: an unknown aggregation.
    """
    mask_BT = mask_BT.bool()
    if aggregation == "token":
        return TokenWeights(mask_BT.float(), mask_BT.long())
    if aggregation == "sequence":
        length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        is_first_BT = mask_BT & (mask_BT.cumsum(1) == 1)
        return TokenWeights(mask_BT / length_B1, is_first_BT.long())
    raise ValueError(f"aggregation must be 'token' or 'sequence', not {aggregation!r}.")
