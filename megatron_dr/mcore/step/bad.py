"""A step in which a role's gradient has NaN or Inf: told to the optimizer, and named.

That there is one, all ranks have in the grams, on the device: nothing waits in the step. Megatron's
optimizer waits for the gradient's norm; behind that (`step_with_ready_grads`, the last thing that
its `step` does) the verdict is read, and the update left out as after an overflow: parameters and
moments stay, and the loop counts a skipped iteration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.mcore import collectives
from megatron_dr.mcore.say import say

_LINES = 8  # of a step: where all microbatches are bad, one line each would be a flood
_STEPS = 50  # of a run that are named; further ones are only counted
_METHOD = "step_with_ready_grads"
Record = dict[str, Any]


class BadGradient(RuntimeError):
    """A role's gradient was not finite, and the run is to end there."""


@dataclass(frozen=True)
class Bad:
    """What of a step is not finite: the same on every rank, on the device.

    Attributes:
        target: whether the target's gradient.
        general: how many general rows.
        spoilt: whether there is no update to apply.
        own: this rank's microbatches, as (role, number, its samples); reads the device.
    """

    target: torch.Tensor
    general: torch.Tensor
    spoilt: torch.Tensor
    own: Callable[[], list[tuple[str, int, list[int]]]]


class Guard:
    """Between the steps of one handle and its optimizer.

    Args:
        policy: `on_bad_gradient`.
        optimizer: Megatron's; None or another: only `stop` can be had, at a step's end.
        fp16: whether Megatron's loss scaler looks for overflows, which are no bad batches.
        forget: called with nothing where a target was bad, on every rank.

    Attributes:
        heard: told of each such step: its number and its records, on every rank.
        look_up: where samples are from, of (role, microbatch) on this rank, if that is known.

    Raises:
        ValueError: the policy can't be had.
    """

    def __init__(
        self, policy: str, optimizer: Any, ddp_config: Any, fp16: bool, forget: Callable[[], None]
    ) -> None:
        self.policy, self._optimizer, self._forget = policy, optimizer, forget
        self.heard: Callable[[int, list[Record]], None] | None = None
        self.look_up: Callable[[str, int], list[str]] | None = None
        self._now: tuple[int, Bad] | None = None
        self._named, self._told = 0, -1  # steps so far, and the last one
        self._off = fp16 and policy != "mean"
        self._hooked = hasattr(optimizer, _METHOD) and not self._off
        _check(policy, self._hooked, ddp_config, fp16)
        if self._hooked:
            self._stock = getattr(optimizer, _METHOD)
            setattr(optimizer, _METHOD, self._step)

    def close(self) -> None:
        """Take it off the optimizer. Safe to call twice."""
        if self._hooked:
            self._hooked = False
            delattr(self._optimizer, _METHOD)

    def begin(self) -> None:
        """A step of the model begins; what the one before left was never asked for."""
        self._now = None

    def found(self, step: int, bad: Bad | None) -> None:
        """A step is done."""
        self._now = None if bad is None or self._off else (step, bad)
        if not self._hooked and self.policy == "stop":
            self._is_spoilt()

    def name(self, step: int, bad: Bad | None) -> None:
        """Name what is bad in a step whose end may not be reached (collective where it is). Reads
        the device."""
        if bad is not None and any(_read(bad)):
            self._tell(step, bad)

    def _step(self, *args: Any, **kwargs: Any) -> bool:
        """In place of the optimizer's own."""
        return False if self._is_spoilt() else bool(self._stock(*args, **kwargs))

    def _is_spoilt(self) -> bool:
        """Reads the device; collective where something was bad.

        Raises:
            BadGradient: with the policy `stop`.
        """
        (step, bad), self._now = self._now or (0, None), None
        if bad is None:
            return False
        target, general, spoilt = _read(bad)
        if not (target or general or spoilt):
            return False
        if target:
            self._forget()
        who = sentence(target, general)
        if self.policy != "stop":
            done = "the update is not applied" if spoilt else "the update is made without it"
            self._say(f"step {step}: {who}: {done} (--dr-on-bad-gradient {self.policy})")
        self._tell(step, bad)
        if spoilt and self.policy == "stop":
            raise BadGradient(
                f"step {step}: {who}: look at what it was made of, or go on past it with "
                "--dr-on-bad-gradient skip."
            )
        return spoilt

    def _say(self, text: str) -> None:
        if self._named < _STEPS:
            say(text)

    def _tell(self, step: int, bad: Bad) -> None:
        """Name the microbatches in the log and to whoever asked (collective)."""
        if self._named >= _STEPS or step == self._told:
            return
        self._named, self._told = self._named + 1, step
        records = records_of(bad, self.look_up)
        if self.heard is not None:
            self.heard(step, records[:_LINES])
        say_records(step, records)
        if self._named == _STEPS:
            say(f"note: {_STEPS} steps had bad gradients; further ones are only counted")


def _check(policy: str, hooked: bool, ddp_config: Any, fp16: bool) -> None:
    if policy == "stop":
        return
    flag = f"on_bad_gradient={policy!r}"
    if ddp_config.check_for_nan_in_grad:
        raise ValueError(
            f"{flag}: Megatron's own check would end the run first: build the model's DDP with "
            "check_for_nan_in_grad=False (--no-check-for-nan-in-loss-and-grad)."
        )
    if fp16 and policy == "mean":
        raise ValueError(
            f"{flag} does not go with fp16: an overflow, by which its loss scaler finds the scale, "
            "would be taken for a bad batch; use bf16, or 'skip'."
        )
    if not hooked and not fp16:
        raise ValueError(
            f"{flag} needs Megatron's optimizer, whose step is left out: give it to attach."
        )


def _read(bad: Bad) -> tuple[bool, int, bool]:
    target, general, spoilt = torch.stack([
        x.to(torch.float64) for x in (bad.target, bad.general, bad.spoilt)
    ]).tolist()  # fmt: skip
    return bool(target), int(general), bool(spoilt)


def sentence(target: bool, general: int) -> str:
    """Whose gradient is not finite."""
    rows = f"{general} general row{'s' * (general > 1)}" if general else ""
    both = " and ".join(filter(None, ["the target" * target, rows]))
    return f"the gradient of {both or 'a row'} has NaN or Inf"


def records_of(bad: Bad, look_up: Callable[[str, int], list[str]] | None) -> list[Record]:
    """All ranks' microbatches that are bad, each once, the target's first (collective)."""
    own = [
        {"role": role, "rank": dist.get_rank(),
         "data rank": parallel_state.get_data_parallel_rank(), "microbatch": number,
         "samples": samples, "from": _places(look_up, role, number, samples)}
        for role, number, samples in bad.own()
    ]  # fmt: skip
    found: dict[tuple[Any, ...], Record] = {}
    for record in (one for of_rank in collectives.of_all_ranks(own) for one in of_rank):
        key = record["role"] != "target", record["data rank"], record["microbatch"]
        kept = found.setdefault(key, record)
        kept["samples"] = kept["samples"] or record["samples"]
        kept["from"] = kept["from"] or record["from"]
    return [found[key] for key in sorted(found)]


def _places(
    look_up: Callable[[str, int], list[str]] | None, role: str, number: int, samples: list[int]
) -> list[str]:
    """Of the samples that are bad; of all of the microbatch where that is not known."""
    places = [] if look_up is None else look_up(role, number)
    return [places[n] for n in samples if n < len(places)] if samples else places


def say_records(step: int, records: list[Record]) -> None:
    for record in records[:_LINES]:
        samples = ", ".join(map(str, record["samples"]))
        of = f", sample{'s' * (len(record['samples']) > 1)} {samples}" if samples else ""
        places = f": {'; '.join(record['from'])}" if record["from"] else ""
        say(
            f"step {step}: look at {record['role']} microbatch {record['microbatch']} of "
            f"data-parallel rank {record['data rank']} (rank {record['rank']}){of}{places}"
        )
    if len(records) > _LINES:
        say(f"step {step}: and at {len(records) - _LINES} more microbatches")
