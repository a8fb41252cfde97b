"""The plugin's configuration: a dataclass for each feature, from which the flags are derived."""

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig

__all__ = ["DRConfig", "TargetConfig"]
