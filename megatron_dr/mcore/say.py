"""What the plugin says: one way, on rank 0."""

import torch.distributed as dist


def say(sentence: str) -> None:
    if dist.get_rank() == 0:
        print(f"megatron_dr: {sentence}", flush=True)
