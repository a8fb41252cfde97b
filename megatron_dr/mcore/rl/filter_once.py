"""A rollout filtered once, before the steps on it: the baseline IIF.

With the policy that sampled, at the start of a cycle,

    score_n = g_n . t ,   g_n = gradient of completion n's part in the sum of the loss of training,
                          t   = gradient of the target's mean loss over its whole rollout

and completions with a score below 0 have no part in any step of the cycle. IIF is iterative
influence-based filtering (arXiv 2505.19281); this is the form in which Dr. Post-Training
(arXiv 2605.07063) compares with it, and as in its authors' code (RLHF/train/trainer.py) the value
loss has no part in a score, all negative scores are dropped, and nothing may be left.

The passes are those of training. The target's gradient is summed over all ranks that have parts of
it; a completion's is a microbatch of its own, and stays partial: the products of each rank's part
with the whole target add up to the score, each piece counted as `ownership` says.

Shape suffixes: N completions, n those of this rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_dr.config.rl import RLConfig
from megatron_dr.mcore import compat, random_state
from megatron_dr.mcore.ownership import OwnedParameter, owned_parameters
from megatron_dr.mcore.rl.forward import Batch, policy_step
from megatron_dr.mcore.step.roles import MicrobatchRouter
from megatron_dr.mcore.step.schedule import Pass, group_size, ours, run
from megatron_dr.rl.experience import Experience
from megatron_dr.rl.weights import token_weights

_CHUNK = 1 << 20  # elements that are multiplied at a time: bounds the temporaries
Flats = list[list[Tensor]]  # by model chunk: one like each of its gradient buffers


def filtered(
    general: Experience, target: Experience, rl: RLConfig, model: list[Any],
    function: Callable[..., Any], schedule: dict[str, Any],
) -> Experience:  # fmt: skip
    """The experience without the completions whose score is below 0, and the share kept.

    Their tokens are masked: a step's mean is over what is kept. Collective; see `scores`.
    """
    kept_N = ~(scores(general, target, rl, model, function, schedule) < 0)  # NaN: Megatron's to see
    mask_NT = general.mask_NT * kept_N[:, None].to(general.mask_NT)
    statistics = {**general.statistics, "kept": float(kept_N.double().mean())}
    return replace(general, mask_NT=mask_NT, statistics=statistics)


def scores(
    general: Experience, target: Experience, rl: RLConfig, model: list[Any],
    function: Callable[..., Any], schedule: dict[str, Any],
) -> Tensor:  # fmt: skip
    """score [N] in float64 on the host, the same on every rank (collective). With fp16 it is times
    the square of the loss scale.

    Of Megatron's state nothing is changed: gradient buffers are zeroed before and after. For the
    time of the call there is one more copy of them.

    Args:
        target: with what the loss that `rl.target_loss` names multiplies log-probabilities by.
        function, schedule: a schedule of Megatron and the arguments of a training step.
    """
    schedule = {**schedule, "forward_step_func": partial(policy_step, rl)}
    with _apart(model):
        plain = not rl.target_has_ratio
        share = _Share(target, rl, schedule["micro_batch_size"], plain, model)
        _run(MicrobatchRouter(model, 0, len(share), None), share, model, function, schedule)
        owned = owned_parameters(model, get_model_config(model[0]))
        target_flats = _target(model, owned, target, rl)
        share = _Share(general, rl, 1, False, model)
        router = _ScoreRouter(model, target_flats, len(share))
        _run(router, share, model, function, schedule)
        for chunk in range(len(model)):
            router.take(chunk)
    own_n = router.score_n
    dist.all_reduce(own_n, group=compat.model_group())
    score_N = own_n.new_zeros(len(general))
    score_N[share.numbers] = own_n[: len(share.numbers)]
    dist.all_reduce(score_N, group=parallel_state.get_data_parallel_group())
    return score_N.cpu()


class _ScoreRouter(MicrobatchRouter):
    """Takes a microbatch's gradient out of a chunk's buffers when the next backward begins."""

    def __init__(self, model: list[Any], target: Flats, number: int) -> None:
        super().__init__(model, 0, number, None)
        self.model, self.target = model, target
        self.score_n = torch.zeros(number, dtype=torch.float64, device=compat.device())
        self._present: dict[int, int] = {}

    def enter(self, chunk: int, microbatch: int, backward: bool) -> None:
        if backward:
            self.take(chunk)
            self._present[chunk] = microbatch

    @torch.no_grad()
    def take(self, chunk: int) -> None:
        """Score what is in the buffers, and zero them."""
        microbatch = self._present.pop(chunk, None)
        if microbatch is None:
            return
        buffers = compat.grad_buffers([self.model[chunk]])
        for buffer, target in zip(buffers, self.target[chunk], strict=True):
            gradient = buffer.grad_data
            for start in range(0, len(gradient), _CHUNK):
                part = gradient[start : start + _CHUNK].float()
                self.score_n[microbatch] += part @ target[start : start + _CHUNK]
            gradient.zero_()


@contextmanager
def _apart(model: list[Any]) -> Iterator[None]:
    """Backwards inside reduce nothing; gradients, random states and settings are put back."""
    random = random_state.save()
    try:
        for chunk in model:
            chunk.zero_grad_buffer()
        with ours(model, get_model_config(model[0])):
            yield
    finally:
        random_state.restore(random)
        for chunk in model:
            chunk.zero_grad_buffer()


@torch.no_grad()
def _target(
    model: list[Any], owned: list[OwnedParameter], target: Experience, rl: RLConfig
) -> Flats:
    """Copies of the buffers with the target's whole mean gradient times each piece's count; the
    buffers are zero again (collective)."""
    count = int(token_weights(target.mask_NT, rl.aggregation).count_BT.sum())
    views: dict[int, Tensor] = {}
    flats: Flats = []
    for chunk in model:
        flats.append([])
        for buffer in compat.grad_buffers([chunk]):
            flat = buffer.grad_data.float() / max(count, 1)
            dist.all_reduce(flat, group=compat.data_group())
            buffer.grad_data.zero_()
            flats[-1].append(flat)
            for parameter, (start, stop, _) in buffer.param_index_map.items():
                views[id(parameter)] = flat[start:stop]
    for o in owned:
        part = views[id(o.parameter)]
        if o.partial == "tensor":
            dist.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
            part *= o.count  # Megatron averages some
        elif o.partial == "embedding":
            dist.all_reduce(part, group=parallel_state.get_embedding_group())
        part *= o.count
    return flats


class _Share:
    """This data rank's share of an experience in microbatches of one size.

    Their number is one that interleaving can divide, at least one.

    Attributes:
        numbers: of its completions.
        filled: with what fills up the last microbatches; it counts nothing.
    """

    def __init__(
        self, experience: Experience, rl: RLConfig, size: int, plain: bool, model: list[Any]
    ) -> None:
        self.experience, self.aggregation = experience.without_returns(), rl.aggregation
        self.size, self.plain = size, plain
        group = parallel_state.get_data_parallel_group()
        self.numbers = list(range(len(experience)))[group.rank() :: group.size()]
        together = size * group_size(model)
        missing = -len(self.numbers) % together if self.numbers else together
        self.filled = [*self.numbers, *[0] * missing]

    def __len__(self) -> int:
        return len(self.filled) // self.size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.filled), self.size):
            rows = self.filled[start : start + self.size]
            batch = self.experience.batch(rows, self.aggregation, self.plain)
            for name in ("weight", "loss_mask"):
                batch[name][max(len(self.numbers) - start, 0) :] = 0
            yield batch


def _run(
    router: MicrobatchRouter, share: _Share, model: list[Any], function: Callable[..., Any],
    schedule: dict[str, Any],
) -> None:  # fmt: skip
    """A schedule call of training without its reduction: gradients into Megatron's buffers."""
    iterators = [iter(share) for _ in model]
    changes = {
        "data_iterator": iterators if len(iterators) > 1 else iterators[0],
        "micro_batch_size": share.size,
    }
    one = Pass(router, lambda *_: None, changes, kept=False)  # nothing is reduced
    run(function, schedule, one, get_model_config(model[0]))
