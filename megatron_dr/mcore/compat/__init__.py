"""The only room that knows Megatron's versions, and which of its names are relied on.

names.py       the model's chunks, buffers and ranks, as all supported versions have them
newest.py      calls that versions have otherwise, as the newest has them
differences.py what stands in for them in older versions, a row each
versions.py    which versions are supported
refusals.py    options that are refused wherever the plugin is attached
contract.py    what `attach` is given
listed.py      which of Megatron's options somebody has looked at: options.txt, flags.txt
"""

from megatron_dr.mcore.compat import newest
from megatron_dr.mcore.compat.contract import check_contract, warn
from megatron_dr.mcore.compat.differences import chosen
from megatron_dr.mcore.compat.listed import unknown_flags
from megatron_dr.mcore.compat.names import (
    SCHEDULES,
    Bucket,
    BucketGroup,
    Chunk,
    GradBuffer,
    Peers,
    Schedule,
    bucket_groups,
    data_group,
    data_ranks_per_row,
    device,
    expert_ranks,
    grad_buffers,
    instance_ranks,
    model_group,
    num_microbatches,
    peers,
    ranks_per_row,
    samples_before,
    samples_of_a_step,
    unwrap,
)
from megatron_dr.mcore.compat.refusals import OF_LOOP, REFUSED, WHO
from megatron_dr.mcore.compat.versions import check_loop

__all__ = [
    "OF_LOOP", "REFUSED", "SCHEDULES", "WHO", "Bucket", "BucketGroup", "Chunk", "GradBuffer",
    "Peers", "Schedule", "batch_on_cp_ranks", "batch_on_tp_ranks", "bucket_groups",
    "change_model", "check_contract", "check_loop", "data_group", "data_ranks_per_row", "device",
    "expert_ranks", "grad_buffers", "instance_ranks", "model_config", "model_group", "moe_losses",
    "num_microbatches", "open_checkpoints_by", "peers", "pretrain", "ranks_per_row",
    "samples_before", "samples_of_a_step", "set_yarn", "unknown_flags", "unwrap", "warn",
]  # fmt: skip

batch_on_cp_ranks = chosen(newest.batch_on_cp_ranks)
batch_on_tp_ranks = chosen(newest.batch_on_tp_ranks)
change_model = chosen(newest.change_model)
model_config = chosen(newest.model_config)
moe_losses = chosen(newest.moe_losses)
open_checkpoints_by = chosen(newest.open_checkpoints_by)
pretrain = chosen(newest.pretrain)
set_yarn = chosen(newest.set_yarn)
