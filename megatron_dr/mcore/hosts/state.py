"""The plugin's state beside a host's checkpoint: a small JSON file in the checkpoint's folder.

It holds the steps done (the sketches' seeds follow from them), what alpha's rule has gathered, and
the settings, so that a run that goes on with others says so. No layout changes any of it.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.mcore.attach import Handle
from megatron_dr.mcore.collectives import Refusal
from megatron_dr.mcore.say import say

FILE = "megatron_dr.json"


def save(handle: Handle, folder: str | os.PathLike[str], of: dict[str, Any] | None = None) -> None:
    """Write the handle's state; on every rank, before the host writes its own part.

    Rank 0 writes. A file that is there is replaced at once, never half written.

    Args:
        of: its `state_dict` of an earlier step; none: the present one.

    Raises:
        OSError: on rank 0: the folder can't be written to, as it could not for the host.
    """
    if dist.get_rank() == 0:
        path = Path(folder) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(f"{FILE}.{os.getpid()}")
        written.write_text(json.dumps(packed(handle, of)))
        written.replace(path)


def load(handle: Handle, folder: str | os.PathLike[str]) -> bool:
    """Take the state of a checkpoint up; on every rank. Whether there was one: where not, that is
    said, and the handle begins at step 0 with nothing gathered.

    Raises:
        ValueError: on every rank: the file can't be read or is none of ours.
    """
    path = Path(folder) / FILE
    try:
        found = of_first_rank(lambda: json.loads(path.read_text()) if path.is_file() else None)
        if found is not None:
            unpack(handle, found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what megatron_dr wrote ({error}): take it away to begin anew."
        ) from None
    if found is None:
        say(f"note: {folder} has no {FILE}: sketches and alpha's rule begin anew")
    return found is not None


def of_first_rank(read: Callable[[], Any]) -> Any:
    """What rank 0 reads, on every rank: a folder of its node alone will do.

    Raises:
        ValueError: on every rank: it can't be read.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [read()]
        except (ValueError, OSError) as error:
            found = [Refusal(str(error))]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Refusal):
        raise ValueError(found[0].sentence)
    return found[0]


def packed(handle: Handle, of: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `unpack` takes: numbers, names and lists of them alone."""
    state = handle.state_dict() if of is None else of
    gathered = None if state["dial"] is None else state["dial"]["averages"].tolist()
    return {"steps": state["steps"], "averages": gathered, "settings": _settings(handle)}


def unpack(handle: Handle, found: dict[str, Any]) -> None:
    """Let the handle go on from there; settings that differ are said.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it was not packed here.
    """
    steps, gathered = found["steps"], found["averages"]
    if type(steps) is not int or steps < 0:
        raise ValueError(f"steps: {steps!r}")
    averages = None if gathered is None else torch.tensor(gathered, dtype=torch.float64)
    before = found["settings"].items()
    now = _settings(handle)
    changed = [f"{n} {now[n]!r} (was {old!r})" for n, old in before if now.get(n, old) != old]
    handle.load_state_dict(
        {"steps": steps, "dial": None if averages is None else {"averages": averages}}
    )
    if changed:
        say(f"note: the checkpoint's run had other settings: {', '.join(changed)}")


def _settings(handle: Handle) -> dict[str, Any]:
    """As JSON gives them back."""
    settings: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(handle.asked)))
    return settings
