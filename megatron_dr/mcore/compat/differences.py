"""What differs between Megatron's versions: a row a difference, which goes when its version goes.

`newest.py` calls Megatron as the newest version has it. Where the version that is installed is
another, `chosen` takes what the table has instead, of a module named after the last version that
is so. A row whose version is older than `versions.OLDEST` is deleted, with its function.
"""

from collections.abc import Callable
from typing import NamedTuple

from megatron_dr.mcore.compat import until_0_17, until_0_18
from megatron_dr.mcore.compat.versions import INSTALLED, Minor


class Difference(NamedTuple):
    """Until a version, that version included, `older` stands in for a function of newest.py.

    Attributes:
        why: what that version lacks, or has otherwise.
    """

    until: Minor
    older: Callable[..., object]
    why: str


TABLE = (
    Difference((0, 17), until_0_17.moe_losses, "routers' losses are kept in moe_utils"),
    Difference((0, 17), until_0_17.batch_on_cp_ranks, "there is no is_hybrid_cp"),
    Difference((0, 18), until_0_18.model_config, "no configuration that a GPT model is built from"),
    Difference((0, 18), until_0_18.pretrain, "pretrain takes a function that builds the model"),
    Difference((0, 18), until_0_18.change_model, "what builds the model has no hooks"),
    Difference((0, 18), until_0_18.batch_on_tp_ranks, "has_cu_seqlens is called is_sft"),
    Difference((0, 18), until_0_18.open_checkpoints_by, "no maybe_msc opens the tracker file"),
    Difference((0, 18), until_0_18.set_yarn, "YaRN's flags reach no configuration"),
)  # fmt: skip


def chosen[F: Callable[..., object]](newest: F, installed: Minor = INSTALLED) -> F:
    """The function of newest.py, or what stands in for it in the version that is installed."""
    rows = [row for row in TABLE if row.older.__name__ == newest.__name__]
    rows = [row for row in rows if installed <= row.until]
    return min(rows).older if rows else newest  # type: ignore[return-value]
