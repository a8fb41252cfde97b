"""What megatron-core 0.17 and older have otherwise: see differences.py."""

from typing import Any


def moe_losses() -> tuple[Any, str]:
    from megatron.core.transformer.moe import moe_utils

    return moe_utils, "_MOE_LAYER_WISE_LOGGING_TRACKER"


def batch_on_cp_ranks(batch: dict[str, Any], group: Any) -> Any:
    from megatron.core.utils import get_batch_on_this_cp_rank

    return get_batch_on_this_cp_rank(batch, cp_group=group)
