"""Data-regularised post-training (Dr. Post-Training, arXiv 2605.07063) on NVIDIA Megatron-Core.

Importing this package patches nothing and imports no Megatron.

    handle = megatron_dr.attach(model, optimizer, config, DRConfig())   # a script of one's own
    megatron_dr.enable()                                                # Megatron's pretrain_gpt.py
"""

from typing import TYPE_CHECKING, Any

from megatron_dr.version import VERSION

if TYPE_CHECKING:
    from megatron_dr.config.dr import DRConfig
    from megatron_dr.mcore.attach import Handle

__all__ = ["DRConfig", "attach", "enable"]
__version__ = VERSION


def __getattr__(name: str) -> Any:
    """DRConfig when it is asked for: `megatron-dr doctor` runs where torch can't be imported."""
    if name != "DRConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_dr.config.dr import DRConfig

    return DRConfig


def attach(model: Any, optimizer: Any, config: Any, dr: "DRConfig | None" = None) -> "Handle":
    """Attach data-regularised training to a Megatron model: see `megatron_dr.mcore.attach`."""
    from megatron_dr.mcore.attach import attach as attach_

    return attach_(model, optimizer, config, dr)


def enable() -> None:
    """Add the plugin and its flags to Megatron's loop: see `megatron_dr.mcore.loop.adaptor`."""
    from megatron_dr.mcore import compat, errors

    with errors.refused():
        compat.check_loop()
    from megatron_dr.mcore.loop.adaptor import enable as enable_

    enable_()
