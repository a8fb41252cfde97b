"""Refusals of a flag or of a configuration's field: rules are data, and one function reads them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_DROP = "{who} {flag} ({why}): drop it."
SWITCH_OFF = "{who} {name} ({why}): switch it off."  # of a configuration without flags


@dataclass(frozen=True)
class Rule:
    """An option that a feature does not go with.

    Attributes:
        name: of an argument of Megatron or ours, or of a configuration's field.
        why: the reason.
        when: whether it is refused, of its value (None where there is none) and of all options.
        says: a sentence of its own, of {who}, {flag}, {name}, {value}, {why} and {options}.
    """

    name: str
    why: str = ""
    when: Callable[[Any, Any], Any] = lambda value, _: value
    says: str = ""


def rules(reasons: dict[str, str]) -> tuple[Rule, ...]:
    """Options that must not be set, each with the reason."""
    return tuple(Rule(name, why) for name, why in reasons.items())


def single(name: str) -> Rule:
    """A size that must be 1."""
    return Rule(
        name, when=lambda size, _: (size or 1) > 1, says="{who} {flag} {value}: set {flag} 1."
    )


def refuse(who: str, found: Iterable[Rule], options: Any, says: str = _DROP) -> None:
    """Raise ValueError, in the sentence of the first rule that the options break.

    Args:
        who: its beginning, such as "MeSO does not support".
        options: arguments or a configuration.
        says: the sentence of rules without one.
    """
    for rule in found:
        value = getattr(options, rule.name, None)
        if rule.when(value, options):
            flag = "--" + rule.name.replace("_", "-")
            raise ValueError((rule.says or says).format(
                who=who, flag=flag, name=rule.name, value=value, why=rule.why, options=options
            ))  # fmt: skip
