"""Whose gradient is not finite, where rows are samples: seen in the grams, said as for other rows.

What happens to the step is Megatron's decision. Without overlap it checks gradients after the
backwards, when all ranks have met; with overlap in the last backward, where a rank may be alone.

Shape suffixes: n general microbatches of this rank, b samples, R = b + 1 with the target last.
"""

import functools

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step.bad import Bad

_LINES = 8  # of microbatches; where all are bad, one line each would be a flood


class NotFinite:
    """What a step's grams show.

    Args:
        tokens_nb: only its shape and device count.
        own: microbatches that the target has by itself.
    """

    def __init__(self, tokens_nb: torch.Tensor, own: int) -> None:
        self._samples, self._own = tokens_nb.shape[1], own
        target_n1 = torch.zeros_like(tokens_nb[:, :1])
        self._bad_nR = torch.cat([torch.zeros_like(tokens_nb), target_n1], 1).bool()

    def see(self, microbatch: int, gram_RR: torch.Tensor) -> None:
        """A window of a microbatch's samples, of one block or several [.., R, R]."""
        bad_R = bad_rows(gram_RR)
        if len(bad_R) <= self._samples + 1:  # else an expert's, of other ranks' samples too
            self._bad_nR[microbatch, : len(bad_R) - 1] |= bad_R[:-1]
        self._bad_nR[microbatch, -1] |= bad_R[-1]

    def see_step(self, bad_nb: torch.Tensor, target: torch.Tensor) -> None:
        """A window of the whole step: this rank's samples, and the target."""
        self._bad_nR |= torch.cat([bad_nb, target.expand(len(bad_nb), 1)], 1)

    def found(self, spoilt: torch.Tensor) -> Bad:
        """For the optimizer (collective).

        Args:
            spoilt: whether anything is not finite, the same on every rank.
        """
        bad_nR = self._bad_nR.float()
        collectives.all_reduce(bad_nR, compat.model_group())
        bad_nR = (bad_nR > 0).float()
        counts_2 = torch.stack([bad_nR[:, -1].amax(), bad_nR[:, :-1].sum()])
        collectives.all_reduce(counts_2, parallel_state.get_data_parallel_group())
        own = functools.partial(_microbatches, bad_nR, self._own)
        return Bad(counts_2[0] > 0, counts_2[1], spoilt, own)

    def tell(self, step: int) -> None:
        """Name them on rank 0 (collective). Reads the device."""
        bad_nR = self._bad_nR.float()
        collectives.all_reduce(bad_nR, compat.model_group())
        group = parallel_state.get_data_parallel_group()
        for sentence in _sentences(collectives.gathered(bad_nR[None], group) > 0, 0):
            say(f"step {step}: {sentence}")

    def tell_own(self, step: int) -> None:
        """Name this rank's own, on the first rank of its model's copy: a peer may not be there."""
        if dist.get_rank(compat.model_group()) == 0:
            rank = parallel_state.get_data_parallel_rank()
            for sentence in _sentences(self._bad_nR[None], rank):
                print(f"megatron_dr: step {step}: {sentence}", flush=True)


def _microbatches(bad_nR: torch.Tensor, own: int) -> list[tuple[str, int, list[int]]]:
    """This rank's; of the target's own all, as a sum over them does not tell which."""
    with_target = bad_nR[:, -1].nonzero().flatten().tolist()
    of_target = range(own) if own and with_target else with_target
    samples_n = [row.nonzero().flatten().tolist() for row in bad_nR[:, :-1]]
    of_general = [("general", n, samples) for n, samples in enumerate(samples_n) if samples]
    return [("target", n, list[int]()) for n in of_target] + of_general


def bad_rows(gram_BRR: torch.Tensor) -> torch.Tensor:
    """[R]: which rows, and last whether the target, are not finite in any block.

    Where rows were not multiplied with rows, one shows in its product with the target, unless it is
    the target that is not finite.
    """
    gram_BRR = gram_BRR.reshape(-1, *gram_BRR.shape[-2:])
    own_BR = ~gram_BRR.diagonal(dim1=1, dim2=2).isfinite()
    cross_BR = ~gram_BRR[..., -1].isfinite() & ~own_BR[:, -1:]
    return (own_BR | cross_BR).any(0)


def _sentences(bad_DnR: torch.Tensor, first: int) -> list[str]:
    """Of data ranks from number `first` on."""
    out = ["the target's gradient has NaN or Inf"] if bad_DnR[..., -1].any() else []
    places = bad_DnR[..., :-1].any(-1).nonzero().tolist()
    for rank, microbatch in places[:_LINES]:
        samples = bad_DnR[rank, microbatch, :-1].nonzero().flatten().tolist()
        which = ", ".join(map(str, samples))
        out.append(
            f"the general gradient of data-parallel rank {first + rank}, microbatch {microbatch}, "
            f"sample{'s' * (len(samples) > 1)} {which}, has NaN or Inf"
        )
    if len(places) > _LINES:
        out.append(f"and so has that of {len(places) - _LINES} more microbatches")
    return out
