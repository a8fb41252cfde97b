"""A step's values for the log, by their names there."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_dr.config import DRConfig
from megatron_dr.mcore.finalize import Projection
from megatron_dr.mcore.stopwatch import Stopwatch
from megatron_dr.projection import report

_NAMES = {
    "cos_general": "dr cos general",
    "cos_update": "dr cos update",
    "residual": "dr residual",
    "effective_rows": "dr rows",
    "zero_rows": "dr zero rows",
}


def metrics(
    projection: Projection,
    config: DRConfig,
    watch: Stopwatch,
    with_target: bool,
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Scalars of the whole model."""
    values: dict[str, torch.Tensor | float] = {}
    if with_target:
        values.update(_geometry(projection, per_block=False))
        if config.alpha_style != "constant":
            values["dr alpha"] = projection.alpha
    if config.rows == "domain":
        for name, weight in zip(config.domains, projection.weights_BM.mean(0)):
            values[f"dr weight {name}"] = weight
    if projection.error_sq_B is not None:
        length_sq = projection.gram_BRR.square().sum().clamp(min=1e-300)
        values["dr sketch error"] = (projection.error_sq_B.sum() / length_sq).sqrt()
    for part, milliseconds in watch.milliseconds.items():
        values[f"dr {part} ms"] = milliseconds
    values["dr bytes"] = float(projection.wire_bytes)
    return {name: torch.as_tensor(v, device=device) for name, v in values.items()}


def write_blocks(
    projection: Projection, names: tuple[str, ...], iteration: int, args: Any, writer: Any
) -> None:
    """Each block's values: to TensorBoard where Megatron writes there, and as lines of the log.

    Args:
        writer: TensorBoard's, on the rank that has one.
    """
    to_board = writer is not None and iteration % args.tensorboard_log_interval == 0
    last = dist.get_rank() == dist.get_world_size() - 1  # where Megatron logs
    to_log = last and iteration % args.log_interval == 0
    if not (to_board or to_log):
        return
    values = {name: v.tolist() for name, v in _geometry(projection, per_block=True).items()}
    for number, block in enumerate(names):
        if to_board:
            for name, of_blocks in values.items():
                writer.add_scalar(f"{name}/{block}", of_blocks[number], iteration)
        if to_log:
            numbers = " | ".join(f"{n}: {v[number]: .3f}" for n, v in values.items())
            print(f" iteration {iteration} | {block} | {numbers}", flush=True)


def _geometry(projection: Projection, per_block: bool) -> dict[str, torch.Tensor]:
    found = report(
        projection.gram_BRR, projection.direction_BR, projection.update_BR, per_block=per_block
    )
    return {name: found[key] for key, name in _NAMES.items()}
