"""How far sketched products of a step are from the exact ones, for the log."""

import torch

from megatron_dr.mcore.layer_rows.places import Place
from megatron_dr.projection.sketch_error import product_errors


class Estimate:
    """Sums over the windows and matrices that this rank speaks for.

    Attributes:
        sums_2: of squared errors of products with the target, and of the lengths' squares.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums_2 = torch.zeros(2, dtype=torch.float64, device=device)

    def see(self, place: Place, feature_NK: torch.Tensor, target_K: torch.Tensor) -> None:
        """Samples' features and the target's; of other scores than sketches nothing is seen."""
        if place.score != "sketched" or not place.speaks:
            return
        found = product_errors(
            feature_NK.unflatten(1, place.sizes), target_K.reshape(place.sizes),
            place.owned.whole_shape,
        )  # fmt: skip
        self.sums_2 += torch.stack(found)


def relative(sums_2: torch.Tensor) -> torch.Tensor:
    """sqrt(errors / lengths); NaN stays NaN."""
    return (sums_2[0].clamp(min=0.0) / sums_2[1].clamp(min=1e-300)).sqrt()
