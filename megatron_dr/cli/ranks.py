"""Commands that `torchrun` may start on several ranks."""

import os
import sys
import warnings
from collections.abc import Callable

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_dr.hf.output import rank, sentence


def run(name: str, act: Callable[[], bool | None], alone: bool = False) -> int:
    """Act in a gloo group of torchrun's ranks; the exit code.

    1 where `act` says False, 2 for a ValueError or a file's error, in a sentence printed once.

    Args:
        alone: a process without torchrun gets a group too.
    """
    for noisy in (r"torch\.distributed", r"torch\._weights_only_unpickler"):
        warnings.filterwarnings("ignore", module=noisy)
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    started = (several or alone) and not dist.is_initialized()
    if started and alone and "RANK" not in os.environ:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    elif started:
        dist.init_process_group("gloo")
    try:
        return int(act() is False)
    except (ValueError, OSError) as error:
        if rank()[0] == 0:
            said = sentence(error) if isinstance(error, OSError) else error
            print(f"{name}: error: {said}", file=sys.stderr)
        return 2
    finally:
        if started:
            dist.destroy_process_group()
