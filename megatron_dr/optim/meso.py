"""MeSO: AdamW and SGD with their moments in a compressed space (Hu et al., arXiv 2605.07063).

For a matrix W [O, I] with gradient G, at step t (from 1) of epoch e = (t - 1) // refresh:

    C = P G Q^T                         [K_out, K_in], P [K_out, O] and Q [K_in, I] of epoch e
    M, V: Adam's moments, or SGD's momentum, of C;   U = what Adam or SGD would step by on C
    W <- (1 - lr wd) W - lr s P^T U Q

P and Q have orthonormal rows (`subspaces.py` says why); a side not longer than its K is left as it
is, and matrices so short on both sides, vectors and all other shapes are plain AdamW and SGD.
Weight decay is decoupled, for SGD too: the subspace of C does not hold the weights.

The scale s. AdamW: sqrt(O I / (K_out K_in)), with which the elements of an update have the root
mean square of U's, as AdamW's own: learning rates carry over. The authors' Gaussian projections
have this scale in them. SGD: 1, the gradient's projection onto the subspace: never longer than the
gradient, and the gradient itself where that lies in the subspace.

At a new epoch the moments move to the new subspaces, with T = P' P^T and R = Q' Q^T:

    M' = T M R^T                                        (the momentum that both subspaces hold)
    V' = (T*T) V (R*R)^T + (1 - a b^T) mean(V),   a = (T*T) 1,  b = (R*R) 1    (* is element-wise)

The second is E[C'*C'] for gradients whose coordinates are uncorrelated: a new direction has the
share a_k b_l in the old subspace, and for the share outside of it nothing is known but the mean.
V' is a weighted mean of V's elements, so it is non-negative and V = v 1 stays v 1; with the same
subspace again (T = R = I) nothing changes. The authors instead rescale both to their old norms.

Shape suffixes: K size of a subspace (of either side), O and I the sides of a matrix.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dr.optim.subspaces import Columns, Side, Subspaces

_SIDES: tuple[Side, Side] = ("out", "in")


@dataclass(frozen=True)
class Shard:
    """What a local matrix is of a whole one that is sharded over the ranks of a group.

    Attributes:
        dim: the sharded dimension.
        length: the whole matrix's, along it.
        columns: the local part of it, as [start, stop) ranges in local order.
        group: the ranks that hold the shards.
    """

    dim: int
    length: int
    columns: Columns
    group: dist.ProcessGroup | None


class Meso(torch.optim.Optimizer):
    """What the AdamW and SGD forms have in common.

    The gradient compressed is `.grad` as `step()` finds it: clipped, and summed over data-parallel
    ranks. Moments have the parameter's dtype.

    :param params: parameters or groups, as for any torch optimizer.
    :param defaults: the form's own hyperparameters.
    :param size_out: K_out.
    :param size_in: K_in.
    :param refresh: steps of an epoch; 0: one epoch for ever.
    :param subspaces: where projections come from, to share those of others; its seed counts.
    """

    moments: ClassVar[tuple[str, ...]]

    def __init__(
        self, params: Any, defaults: dict[str, Any], size_out: int, size_in: int, refresh: int,
        subspaces: Subspaces | None,
    ) -> None:  # fmt: skip
        for name, size in (("size_out", size_out), ("size_in", size_in)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, not {size}.")
        if refresh < 0:
            raise ValueError(f"refresh must be at least 0, not {refresh}.")
        self.subspaces = Subspaces() if subspaces is None else subspaces
        self.sizes, self.refresh = (size_out, size_in), refresh
        self.shards: dict[Tensor, Shard] = {}  # of sharded matrices; all others are whole
        # Those of a run go into its checkpoints: moments mean nothing under others.
        fixed = {"sizes": self.sizes, "refresh": refresh, "seed": self.subspaces.seed}
        super().__init__(params, {**defaults, "meso": fixed})

    def is_compressed(self, parameter: Tensor) -> bool:
        """Whether its moments are smaller than the parameter."""
        return any(size < length for _, length, size, _ in self._sides(parameter))

    def compress(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """C = P G Q^T [K_out, K_in] as the next step has it; of a shard, its share of the sum.

        The gradient itself where nothing is compressed.
        """
        p_KO, q_KI = self._projections(parameter)
        factors = [p_KO, gradient.to(parameter.dtype), None if q_KI is None else q_KI.T]
        given = [factor for factor in factors if factor is not None]
        product: Tensor = torch.linalg.multi_dot(given) if len(given) > 1 else given[0]
        return product

    def decompress_(self, parameter: Tensor, update_KK: Tensor, alpha: float) -> None:
        """parameter += alpha P^T U Q, in place: for a shard, its part of it."""
        p_KO, q_KI = self._projections(parameter)
        if q_KI is not None:
            left_OK = update_KK if p_KO is None else p_KO.T @ update_KK
            parameter.addmm_(left_OK, q_KI, alpha=alpha)
        elif p_KO is not None:
            parameter.addmm_(p_KO.T, update_KK, alpha=alpha)
        else:
            parameter.add_(update_KK, alpha=alpha)

    def init_state(self) -> None:
        """Zero moments for each parameter that has none: what a checkpoint is loaded into."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if not self.state[parameter]:
                    shape = self._moment_shape(parameter)
                    zeros = {name: parameter.new_zeros(shape) for name in self.moments}
                    self.state[parameter].update(step=0, **zeros)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Compress all gradients, sum the shares of shards, move the parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.init_state()
        work = [
            (parameter, group, self.compress(parameter, parameter.grad))
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self._sum_shares([(parameter, share) for parameter, _, share in work])
        for parameter, group, gradient in work:
            self._move(parameter, group, gradient)
        if work:
            last = work[-1][0]
            self.subspaces.keep(self._epoch(self.state[last]["step"]))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: other sizes, refresh or seed than those of the saved moments.
        """
        for group in state_dict["param_groups"]:
            saved, own = group.get("meso"), self.defaults["meso"]
            if saved is None:
                raise ValueError("the checkpoint's optimizer is not MeSO: leave it out.")
            for name, value in own.items():
                if saved[name] != value:
                    raise ValueError(
                        f"the checkpoint's MeSO has {name} {saved[name]} and this run {value}: "
                        "use the checkpoint's, or leave its optimizer out."
                    )
        super().load_state_dict(state_dict)

    def moment_bytes(self) -> tuple[int, int]:
        """(these moments, those of torch's optimizer) on this rank."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        own = sum(self._moment_shape(p).numel() * p.element_size() for p in parameters)
        return len(self.moments) * own, len(self.moments) * sum(p.nbytes for p in parameters)

    def projection_bytes(self) -> dict[tuple[Any, ...], int]:
        """{what it belongs to: its size} for each P and Q that steps keep on this rank."""
        found: dict[tuple[Any, ...], int] = {}
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if self.is_compressed(parameter):
                for side, length, size, columns in self._sides(parameter):
                    held = length if columns is None else sum(b - a for a, b in columns)
                    if size < length or columns is not None:
                        key = (side, length, size, columns, parameter.dtype)
                        found[key] = size * held * parameter.element_size()
        return found

    # -- to be said by each form -----------------------------------------------------------------
    def _direction(
        self, state: dict[str, Any], gradient: Tensor, group: dict[str, Any]
    ) -> tuple[Tensor, float]:
        """(U, step size) from the moments, which take the gradient in."""
        raise NotImplementedError

    def _transport(self, state: dict[str, Any], t_KK: Tensor, r_KK: Tensor) -> None:
        """Moments to the new subspaces."""
        raise NotImplementedError

    def _scale(self, parameter: Tensor) -> float:
        """s: 1, or what a form says."""
        return 1.0

    # -- steps -----------------------------------------------------------------------------------
    def _move(self, parameter: Tensor, group: dict[str, Any], gradient: Tensor) -> None:
        state = self.state[parameter]
        if self.is_compressed(parameter) and state["step"]:
            old, new = self._epoch(state["step"]), self._epoch(state["step"] + 1)
            if old != new:
                t_KK, r_KK = (
                    self.subspaces.transport(side, length, size, old, new, parameter)
                    for side, length, size, _ in self._sides(parameter)
                )
                self._transport(state, t_KK, r_KK)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
        update, size = self._direction(state, gradient, group)
        self.decompress_(parameter, update, -size * self._scale(parameter))
        state["step"] += 1

    def _sum_shares(self, work: list[tuple[Tensor, Tensor]]) -> None:
        """C of a sharded matrix is the sum of its shards': one all-reduce per group and dtype."""
        together: dict[Any, list[Tensor]] = {}
        for parameter, share in work:
            if parameter in self.shards and self.is_compressed(parameter):
                key = (self.shards[parameter].group, share.dtype)
                together.setdefault(key, []).append(share)
        for (group, _), shares in together.items():
            flat = torch.cat([share.reshape(-1) for share in shares])
            dist.all_reduce(flat, group=group)
            for share, summed in zip(
                shares, torch.split(flat, [s.numel() for s in shares]), strict=True
            ):
                share.copy_(summed.view_as(share))

    def _epoch(self, step: int) -> int:
        """Of step 1, 2, ..."""
        return (step - 1) // self.refresh if self.refresh else 0

    def _sides(self, parameter: Tensor) -> list[tuple[Side, int, int, Columns | None]]:
        """(side, whole length, K, columns held here; None: all) of a matrix; else nothing."""
        if parameter.ndim != 2:
            return []
        shard = self.shards.get(parameter)
        sides: list[tuple[Side, int, int, Columns | None]] = []
        for dim, (side, size) in enumerate(zip(_SIDES, self.sizes, strict=True)):
            length, columns = parameter.shape[dim], None
            if shard is not None and shard.dim == dim:
                length, columns = shard.length, shard.columns
            sides.append((side, length, min(size, length), columns))
        return sides

    def _moment_shape(self, parameter: Tensor) -> torch.Size:
        if self.is_compressed(parameter):
            return torch.Size([size for _, _, size, _ in self._sides(parameter)])
        return parameter.shape

    def _projections(self, parameter: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(P, Q), None for the identity; of a sharded side the columns of the local part."""
        if not self.is_compressed(parameter):
            return None, None
        done = self.state[parameter]["step"] if self.state[parameter] else 0
        epoch, make = self._epoch(done + 1), self.subspaces.rows
        p_KO, q_KI = (
            make(side, length, size, epoch, parameter, columns)
            if size < length or columns is not None
            else None
            for side, length, size, columns in self._sides(parameter)
        )
        return p_KO, q_KI
