"""Whether all ranks were started alike: found before Megatron makes its process groups.

Each rank leaves what it was started with, or the sentence of its refusal, where torch's ranks meet
anyway; rank 0 compares, says what differs, and all ranks end. No collective runs before.
"""

import datetime
import json
import os
from argparse import Namespace
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]

from megatron_dr.mcore import collectives, errors
from megatron_dr.mcore.loop.record import PLUGIN, Record

_given: Store | None = None
_kept: Store | None = None  # rank 0 may be its server, in which Megatron's ranks meet after
_times = 0


def meet_in(store: Store | None) -> None:
    """Where ranks meet, instead of torchrun's."""
    global _given
    _given = store


def check(args: Namespace, refusal: str, found: Record) -> None:
    """End all ranks, with one sentence of rank 0, where one of them refuses or they differ.

    Args:
        refusal: this rank's; empty where it has none.
        found: what must be alike.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or getattr(args, "fake_process_group", False):
        if refusal:
            errors.leave(refusal)
        return
    wait = datetime.timedelta(minutes=getattr(args, "distributed_timeout_minutes", None) or 10)
    store, rank, world = _meeting(wait)
    store.set(str(rank), json.dumps([refusal, found]))
    if rank != 0:
        verdict = _arrived(store, ["verdict"], wait)[0]
        if verdict:
            errors.leave(verdict)
        return
    everyone = _arrived(store, [str(number) for number in range(world)], wait)
    verdict = _verdict([json.loads(one) for one in everyone])
    try:
        if verdict:
            errors.leave(verdict)
    finally:  # when it is said: a launcher ends all ranks where one has ended
        store.set("verdict", verdict)


def _meeting(wait: datetime.timedelta) -> tuple[Store, int, int]:
    """A store of this check alone, this rank and the number of ranks."""
    global _kept, _times
    _times += 1
    if dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
        rank, world = dist.get_rank(), dist.get_world_size()
    elif _given is not None:
        store, rank, world = _given, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    else:
        store, rank, world = next(rendezvous("env://", timeout=wait))
        _kept = store
    return PrefixStore(f"megatron_dr {_times}", store), rank, world


def _arrived(store: Store, keys: list[str], wait: datetime.timedelta) -> list[str]:
    try:
        store.wait(keys, wait)
    except RuntimeError as error:  # of torch: time is over
        missing = [int(key) for key in keys if key.isdigit() and not store.check([key])]
        if not missing:
            raise
        errors.leave(
            f"{collectives.said(missing)} did not come to the start within {wait} ({error}): look "
            "for what was said there."
        )
    return [store.get(key).decode() for key in keys]


def _verdict(of_ranks: list[tuple[str, Record]]) -> str:
    """The sentence on a start that can't be; empty where it can."""
    refusals = {rank: refusal for rank, (refusal, _) in enumerate(of_ranks) if refusal}
    if refusals:
        return collectives.of_whom(refusals, len(of_ranks))
    return difference([found for _, found in of_ranks])


def difference(found: list[Record]) -> str:
    """The first thing that ranks have otherwise, and who; empty where there is none."""
    for name in dict.fromkeys(name for one in found for name in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(found):
            ranks.setdefault(json.dumps(one.get(name)), []).append(rank)
        if len(ranks) > 1:
            what = {text: json.loads(text) for text in ranks}
            each = [f"{said(what[text])} on {collectives.said(on)}" for text, on in ranks.items()]
            flag = "the plugin" if name == PLUGIN else name if " " in name else f"--{name}"
            flag = flag.replace(":", " ")  # of one of several sets
            return (
                f"ranks were started differently: {flag} is {' and '.join(each)}: start every "
                "rank with the same flags, data and version."
            )
    return ""


def said(value: Any) -> str:
    """A flag's value in a sentence."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "not given" if value is None else str(value)
