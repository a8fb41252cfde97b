"""What a resumed run has otherwise than the run of its checkpoint: said, or refused.

Each step's own dials may change. What may not, unless it is named by --dr-changed-ok, are features
switched off, and what the checkpoint's state belongs to: places in data, rollouts under way. A run
with --skip-train takes no step, and needs of these only what adds weights to the model.
"""

from argparse import Namespace
from typing import Any

from megatron_dr.mcore.loop import parts, record
from megatron_dr.mcore.loop.agreement import said
from megatron_dr.mcore.loop.arguments import configs_from_args
from megatron_dr.mcore.loop.record import PACKAGE, PLUGIN, Record
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.part import Part

_TARGET = "dr-target-data"
ATTRIBUTE = "megatron_dr_record"
_PLACE = "its place in that data is of no use in other data"
_OFF = "what it has learnt and gathered by it would be lost"


def check(args: Namespace, before: Namespace, speak: bool) -> None:
    """Of a run that goes on from a checkpoint with the arguments `before`.

    Args:
        speak: whether changes that are none to refuse are said.

    Raises:
        ValueError: it can't be gone on so, or --dr-changed-ok names what is no flag.
    """
    then, now = _then(before), getattr(args, ATTRIBUTE, None)
    if then is None or now is None or not getattr(before, "consumed_train_samples", 0):
        return  # nothing was trained, or by a version that can't be asked
    changed = _changed(then, now)
    refused, allowed = (
        _refused(args, before, then, now),
        set(getattr(args, "dr_changed_ok", None) or ()),
    )
    unknown = sorted(allowed - then.keys() - now.keys() - {"dr-target-refresh"})
    if unknown:
        raise ValueError(
            f"--dr-changed-ok {unknown[0]}: no flag of this run or the checkpoint's has that name, "
            "which is said without dashes in front: mend it or drop it."
        )
    speak = speak and not args.skip_train
    for name, (old, new) in changed.items():
        if name in refused and name not in allowed:
            raise ValueError(
                f"{args.load}: the checkpoint's run had {_named(name)} {said(old)}, and this one "
                f"has {said(new)}, but {refused[name]}: give what that run had, or say that it is "
                f"meant with --dr-changed-ok {name}, or begin a new run from it with --finetune."
            )
        if speak:
            say(f"resumed with {_named(name)} {said(new)}; the checkpoint's run had {said(old)}")


def _then(before: Namespace) -> Record | None:
    """The record of the run before; of an older version, as far as its flags tell."""
    kept: Any = getattr(before, ATTRIBUTE, None)
    if kept is not None:
        if not isinstance(kept, dict) or PLUGIN not in kept or not all(map(_is_text, kept)):
            raise ValueError(
                "the checkpoint's common state is damaged: what it says of its run's flags is no "
                "record of them."
            )
        return kept
    try:
        return record.of(before, configs_from_args(before), data=False)
    except (ValueError, AttributeError, TypeError):
        return None


def _is_text(name: Any) -> bool:
    return isinstance(name, str)


def _changed(then: Record, now: Record) -> dict[str, tuple[Any, Any]]:
    """{name: (old, new)}; of a feature that is on in one run alone, its switch stands for all.

    What only one of the records has says nothing: a version has dials that another has not.
    """
    if then[PLUGIN] != now[PLUGIN]:
        return {PLUGIN: (then[PLUGIN], now[PLUGIN])}
    names = [
        n for n in dict.fromkeys([*then, *now]) if n in _switches() or (n in then and n in now)
    ]
    found = {name: (then.get(name), now.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in found.items() if old != new}


def _switches() -> list[str]:
    """Names that a record has where a feature is on."""
    own = [_switch(part) for part in parts.PARTS if part.switch]
    return ["dr-set", *own, *(flag.removeprefix("--") for p in parts.PARTS for flag in p.flags)]


def _switch(part: Part) -> str:
    return f"dr-{part.name}-{part.switch.replace('_', '-')}"


def _refused(args: Namespace, before: Namespace, then: Record, now: Record) -> dict[str, str]:
    """Names that must be as they were, and why."""
    if args.skip_train:
        return _of_the_model(args, before, then, now)
    has_target = then.get(_TARGET) is not None
    found = dict.fromkeys([_TARGET, *_of_sets(then)], _PLACE) if has_target else {}
    for part, own in parts.on(args):
        found |= part.kept(own, before)
    found |= {name: _OFF for name in _switches() if name in then and name not in now}
    return found | ({PLUGIN: _OFF} if now[PLUGIN] == "off" else {})


def _of_sets(then: Record) -> list[str]:
    """The records of each target set's data by itself."""
    return [name for name in then if name.startswith(f"{_TARGET}:")]


def _of_the_model(args: Namespace, before: Namespace, then: Record, now: Record) -> dict[str, str]:
    """As `_refused`, of what the loaded weights are of."""
    why = "what is evaluated would be the model without it"
    own = [part for part in parts.PARTS if part.switch and part.adds_weights]
    off = {name: why for name in map(_switch, own) if name in then and name not in now}
    kept = {name: reason for part, given in parts.on(args) if part.adds_weights
            for name, reason in part.kept(given, before).items()}  # fmt: skip
    return off | kept | ({PLUGIN: why} if off and now[PLUGIN] == "off" else {})


def _named(name: str) -> str:
    """A record's name in a sentence; of one of several sets, with the set's."""
    name = name.replace(":", " ")
    return "the plugin" if name == PLUGIN else name if name == PACKAGE else f"--{name}"
