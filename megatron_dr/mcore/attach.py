"""`attach`: the plugin on a Megatron model. The only file that knows both kinds of rows."""

from typing import Any

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat, errors
from megatron_dr.mcore.buffer_rows import row_choice
from megatron_dr.mcore.buffer_rows.rows import BufferRows
from megatron_dr.mcore.layer_rows import window
from megatron_dr.mcore.layer_rows.rows import LayerRows
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step.handle import Handle, attached
from megatron_dr.version import VERSION

__all__ = ["Handle", "attach", "attached"]


def attach(model: Any, optimizer: Any, config: Any, dr: DRConfig | None = None) -> Handle:
    """Attach data-regularised training to a Megatron model. Idempotent; call it last in set-up.

    Args:
        model: Megatron's list of DDP-wrapped model chunks.
        optimizer: Megatron's optimizer; it is not touched.
        config: `get_model_config(model[0])`.
        dr: what to project on what.

    Returns:
        A handle: `handle.step(...)` in place of `forward_backward_func(...)`, `handle.detach()`.

    Raises:
        ValueError: an unsupported model, Megatron feature or version, saying what to change.
    """
    dr = dr or DRConfig()
    with errors.agreed():
        compat.check_contract(model, config)
        _check_alike(dr)
        existing = attached(model)
        if existing is not None:
            if dr in (existing.dr, existing.asked):
                return existing
            existing.detach()
        compat.warn(config, model[0].ddp_config, getattr(optimizer, "config", None))
        asked, (dr, why) = dr, row_choice.settled(dr, model)
        dr, of_window = window.settled(dr)
        for sentence in filter(None, (why, of_window)):
            say(sentence)
        kind = LayerRows if dr.row_kind.in_layers else BufferRows
        handle = Handle(list(model), optimizer, config, dr, kind)
        handle.asked = asked
        return handle


def _check_alike(dr: DRConfig) -> None:
    """Raise ValueError where ranks were given different configurations (collective)."""
    of_ranks = collectives.of_all_ranks({"version": VERSION} | vars(dr))
    for name in of_ranks[0]:
        values = [one[name] for one in of_ranks]
        other = next((n for n, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"attach was given {name} {values[0]!r} on rank 0 and {values[other]!r} on rank "
                f"{other}: give every rank the same configuration."
            )
