"""MeSO's two forms: what Adam and SGD do with the compressed gradient (equations: `meso.py`)."""

import math
from typing import Any

from torch import Tensor, outer

from megatron_dr.optim.meso import Meso
from megatron_dr.optim.subspaces import Subspaces


class MesoAdamW(Meso):
    """M <- b1 M + (1 - b1) C,  V <- b2 V + (1 - b2) C*C,  U = M^ / (sqrt(V^) + eps).

    With M^ = M / (1 - b1^t) and V^ = V / (1 - b2^t), as in torch.optim.AdamW.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 0.01, *, size_out: int = 512, size_in: int = 512,
        refresh: int = 200, subspaces: Subspaces | None = None,
    ) -> None:  # fmt: skip
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, own, size_out, size_in, refresh, subspaces)

    def _direction(
        self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        beta1, beta2 = group["betas"]
        step, mean, square = state["step"] + 1, state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient.to(mean.dtype), 1.0 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = square.sqrt().div_(math.sqrt(1.0 - beta2**step)).add_(group["eps"])
        return mean / root, group["lr"] / (1.0 - beta1**step)

    def _transport(self, state: dict[str, Any], t_KK: Tensor, r_KK: Tensor) -> None:
        state["exp_avg"].copy_(t_KK @ state["exp_avg"] @ r_KK.T)
        state["exp_avg_sq"].copy_(transport_square(state["exp_avg_sq"], t_KK, r_KK))

    def _scale(self, parameter: Tensor) -> float:
        return math.prod(math.sqrt(length / size) for _, length, size, _ in self._sides(parameter))


class MesoSGD(Meso):
    """M <- momentum M + C,  U = M, as in torch.optim.SGD but for its coupled weight decay."""

    moments = ("momentum_buffer",)

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0, *,
        size_out: int = 512, size_in: int = 512, refresh: int = 200,
        subspaces: Subspaces | None = None,
    ) -> None:  # fmt: skip
        own = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, own, size_out, size_in, refresh, subspaces)

    def _direction(
        self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        return state["momentum_buffer"].mul_(group["momentum"]).add_(gradient), group["lr"]

    def _transport(self, state: dict[str, Any], t_KK: Tensor, r_KK: Tensor) -> None:
        state["momentum_buffer"].copy_(t_KK @ state["momentum_buffer"] @ r_KK.T)


def transport_square(v_KK: Tensor, t_KK: Tensor, r_KK: Tensor) -> Tensor:
    """V' = (T*T) V (R*R)^T + (1 - a b^T) mean(V), a and b the row sums of T*T and R*R."""
    t2_KK, r2_KK = t_KK.square(), r_KK.square()
    a_K, b_K = t2_KK.sum(1).clamp(max=1.0), r2_KK.sum(1).clamp(max=1.0)  # but for rounding, <= 1
    unseen_KK = 1.0 - outer(a_K, b_K)
    return t2_KK @ v_KK @ r2_KK.T + unseen_KK * v_KK.mean()
