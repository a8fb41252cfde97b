"""The rows that a configuration makes on the ranks there are, and what can't be made: refused."""

import math
from typing import Any, Literal

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.buffer_rows import levels
from megatron_dr.mcore.buffer_rows.row_map import RowMap
from megatron_dr.mcore.step.rows import Call
from megatron_dr.plan.rows import near_a_node, nests


def row_map_of(dr: DRConfig) -> RowMap:
    """Rows of all ranks.

    Raises:
        ValueError: target ranks or domains that this layout can't have.
    """
    peers = ranks_per_row(dr)
    groups = dist.get_world_size(compat.data_group()) // peers
    together = max(1, peers // parallel_state.get_context_parallel_world_size())
    ranks = parallel_state.get_data_parallel_world_size()
    if dr.target_ranks and (dr.target_ranks % together or dr.target_ranks >= ranks):
        raise ValueError(
            f"--dr-target-ranks {dr.target_ranks} must be a multiple of {together} (ranks that "
            f"make one row have one role) below the data-parallel size {ranks}."
        )
    target_groups = dr.target_ranks // together
    if dr.row_kind.named and len(dr.domains) < 2:
        raise ValueError("domain rows need the names of at least two general corpora.")
    halves: Literal["none", "groups", "buffers"] = "none"
    if dr.alpha_style == "auto" and not target_groups % 2:
        halves = "buffers" if (target_groups or groups) % 2 else "groups"
    targets = dr.target_sets if dr.targets == "maximin" else 1
    if dr.targets == "maximin" and targets < 2:
        raise ValueError("targets='maximin' needs target_sets, how many there are: 2 or more.")
    return RowMap(groups, dr.num_slots, target_groups, halves, dr.row_kind.named, peers, targets)


def ranks_per_row(dr: DRConfig) -> int:
    """Neighbouring data x context ranks of a row.

    Raises:
        ValueError: --dr-row-ranks can't be had in this layout.
    """
    least, ranks = compat.ranks_per_row(), dist.get_world_size(compat.data_group())
    if "row_ranks" not in dr.row_kind.dials:
        return least
    instance = compat.instance_ranks()
    if not dr.row_ranks and instance == ranks:
        return near_a_node(ranks, least, _data_ranks_of_a_node())
    if not dr.row_ranks and dr.row_kind.at_attach:
        return near_a_node(ranks, least, instance, instance)
    if not dr.row_ranks:
        return math.lcm(least, instance)
    if dr.row_ranks % least or ranks % dr.row_ranks:
        raise ValueError(
            f"--dr-row-ranks {dr.row_ranks} must be a multiple of {least} (ranks that share "
            f"sequences or exchange tokens) and divide the {ranks} data x context ranks."
        )
    if not nests(dr.row_ranks, instance):
        raise ValueError(
            f"--dr-row-ranks {dr.row_ranks} must divide, or be a multiple of, the {instance} "
            "data x context ranks of an instance (--num-distributed-optimizer-instances)."
        )
    return dr.row_ranks


def _data_ranks_of_a_node() -> int:
    """Of the data group. Where nodes are uneven, the least: rows are the same for all ranks
    (collective)."""
    node = levels.node_of(dist.get_rank())
    members = dist.get_process_group_ranks(compat.data_group())
    on_node = sum(levels.node_of(rank) == node for rank in members)
    return int(min(collectives.of_all_ranks(on_node)))


def check_routers(dr: DRConfig, config: Any) -> None:
    """Raise ValueError where routers would mix roles that run on different ranks."""
    if dr.target_ranks and "global_aux_loss" in config.moe_router_load_balancing_type:
        raise ValueError(
            "--moe-router-load-balancing-type global_aux_loss adds up the tokens of all data ranks "
            f"in every forward, of both roles with --dr-target-ranks {dr.target_ranks}: use "
            "aux_loss or seq_aux_loss, or --dr-target-ranks 0."
        )


def check_batch(dr: DRConfig, row_map: RowMap, num_general: int) -> None:
    """Raise ValueError where a step's microbatches can't make the rows that the set needs.

    Args:
        num_general: microbatches of a rank that runs them.
    """
    if not row_map.by_domain and num_general % dr.num_slots:
        raise ValueError(
            f"{num_general} general microbatches per rank can't be divided into {dr.num_slots} "
            "slots: change --dr-slots, or --global-batch-size."
        )
    rows, least = row_map.num_rows, dr.feasible_set().least_rows
    if 1 < rows < least - 1e-9:
        raise ValueError(
            f"--dr-set {dr.set} with fraction {dr.fraction} needs at least "
            f"{int(least + 0.999)} rows, but a step has {rows}: raise --dr-slots, "
            "the data-parallel size or --dr-fraction."
        )


def lacks(dr: DRConfig, row_map: RowMap, call: Call) -> str:
    """Why alpha and beta can't be chosen from a step's gram; empty where they can, or are not."""
    if dr.alpha_style != "auto":
        return ""
    if row_map.halves == "none":
        return f"an odd number of row groups runs the target (--dr-target-ranks {dr.target_ranks})"
    if dr.weighs_rows and row_map.num_rows < 2:
        return "a step has one row, which leaves a projection nothing to choose"
    return call.no_halves if row_map.halves == "buffers" else ""
