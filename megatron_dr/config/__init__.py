"""The plugin's configuration: a dataclass for each feature, from which the flags are derived."""

from megatron_dr.config.dr import DRConfig, TargetConfig

__all__ = ["DRConfig", "TargetConfig"]
