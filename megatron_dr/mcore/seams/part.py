"""A feature of training as one object, so that the training loop needs no branch for it."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.refuse import Rule, refuse
from megatron_dr.mcore.seams.source import Source


class Part:
    """An entry of `parts.PARTS`. What it does not override does nothing.

    Attributes:
        name: its flags are --dr-NAME-FIELD.
        config: the dataclass whose fields they are; None: a part of plain flags has its own `of`.
        switch: the field whose flag switches it on.
        flag: what switches it on, as sentences say it.
        flags: more flags, with what `add_argument` needs.
        who: how its refusals begin.
        adds_weights: whether a model is another one without it, also where nothing is trained.
        refused: what it does not go with, before Megatron's own checks and after them, which switch
            flags on.
    """

    name = ""
    config: Any = None
    switch = ""
    flag = ""
    flags: dict[str, dict[str, Any]] = {}
    who = ""
    adds_weights = False
    refused: tuple[Rule, ...] = ()

    def of(self, args: Namespace) -> Any:
        """The configuration of the flags given; None where the part is off.

        Raises:
            ValueError: flags out of range, or without the one that switches it on.
        """
        fields = [f.name for f in dataclasses.fields(self.config) if f.metadata]
        given = {f: getattr(args, f"dr_{self.name}_{f}", None) for f in fields}
        given = {f: value for f, value in given.items() if value is not None}
        if self.switch in given:
            return self.config(**given)
        if given:
            first = next(iter(given)).replace("_", "-")
            raise ValueError(
                f"--dr-{self.name}-{first} needs {self.flag}: give it, or drop the flag."
            )
        return None

    def refuse(self, options: Any) -> None:
        """Raise ValueError where Megatron's arguments, or its configuration, are `refused`."""
        refuse(self.who, self.refused, options)

    # -- arguments; `own` is what `of` gives -----------------------------------------------------
    def defaults(self, own: Any, given: dict[str, Any]) -> None:
        """Add to the plugin's flags that were given, by field, or raise ValueError."""

    def is_target(self, own: Any) -> bool:
        """Whether it makes the general data the target too."""
        return False

    def step_target(
        self, own: Any, dr: DRConfig, target: TargetConfig | None
    ) -> TargetConfig | None:
        """The target as the steps have it, of what it would be without the part; None: without."""
        return target

    def prepare(self, own: Any, args: Namespace) -> None:
        """Before Megatron's own checks: set what the part needs, or raise ValueError."""

    def settle(self, own: Any, args: Namespace) -> None:
        """As `prepare`, after them."""

    def resume(self, own: Any, args: Namespace, before: Namespace) -> None:
        """Raise ValueError where the run that saved a checkpoint can't be gone on with."""

    def kept(self, own: Any, before: Namespace) -> dict[str, str]:
        """Flags, without dashes in front, that must be as in the run that saved a checkpoint, and
        why, as a sentence has it after "but"."""
        return {}

    # -- model and optimizer ---------------------------------------------------------------------
    def on_model(self, own: Any, args: Namespace) -> Callable[[list[Any]], Any] | None:
        """What changes the model's chunks, before DDP wraps them."""
        return None

    def owns(self, key: Any) -> bool:
        """Whether a key of a model's checkpoint is of what it added."""
        return False

    def on_optimizer(self, own: Any, args: Namespace, optimizer: Any, model: list[Any]) -> None:
        """Change the optimizer that Megatron made, before a checkpoint is loaded."""

    # -- data ------------------------------------------------------------------------------------
    def known(self, args: Namespace) -> dict[str, Any]:
        """Fields of `DRConfig` that have no flag."""
        return {}

    def on_data(self, args: Namespace, train: Any) -> Any:
        """The general training set, as the part needs it."""
        return train

    def source(self, own: Any, args: Namespace, target: TargetConfig) -> Source | None:
        """Where a run gets its data and forward step; None: from the others."""
        return None
