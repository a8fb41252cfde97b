"""The plugin in RL systems that call Megatron's schedules themselves: verl, slime, NeMo-RL.

`regularised` and `regularise_next` turn such a host's training call into `handle.step`; the modules
`verl`, `slime` and `nemo_rl` put them at the host's own extension points. See docs/rl_systems.md.
"""

from megatron_dr.mcore.hosts.schedules import (
    Training,
    attach,
    reaching,
    regularise_next,
    regularised,
)

__all__ = ["Training", "attach", "reaching", "regularise_next", "regularised"]
