"""The plugin in a script of one's own: Megatron-Core's model, DDP, optimizer and schedule by hand.

    torchrun --nproc-per-node 2 examples/attach.py

Random tokens stand for data and nothing is saved. The lines of the plugin are marked.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import megatron_dr  # plugin
from megatron_dr.mcore import cpu

cpu.enable()  # this example runs without a GPU; leave it out where there is one

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dr.mcore.cpu.layers import layer_spec  # noqa: E402

VOCABULARY, LENGTH = 128, 16


def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed + 1000 * dist.get_rank())
    while True:
        text = torch.randint(0, VOCABULARY, (1, LENGTH + 1), generator=generator)
        yield {"tokens": text[:, :-1], "labels": text[:, 1:]}


def loss_func(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    total, count = output.sum(), torch.tensor(output.numel(), dtype=torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(data)
    positions = torch.arange(LENGTH)[None]
    return model(batch["tokens"], positions, None, labels=batch["labels"]), loss_func


def build() -> tuple[list[Any], Any, TransformerConfig]:
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, normalization="RMSNorm",
        add_bias_linear=False, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        persist_layer_norm=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    model = GPTModel(config, layer_spec(config), VOCABULARY, LENGTH, position_embedding_type="rope")
    model.model_type = ModelType.encoder_or_decoder
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True)
    chunks = [DistributedDataParallel(config, ddp_config, model)]
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-3), chunks)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = chunks[0].no_sync
    return chunks, optimizer, config


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    model, optimizer, config = build()
    handle = megatron_dr.attach(model, optimizer, config, megatron_dr.DRConfig(slots=4))  # plugin
    general, target = batches(1), batches(2)
    forward_backward_func = get_forward_backward_func()
    for step in range(5):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        handle.step(  # plugin: was forward_backward_func(
            forward_backward_func,  # plugin
            target_data_iterator=target,  # plugin
            num_target_microbatches=2,  # plugin
            forward_step_func=forward_step,
            data_iterator=general,
            model=model,
            num_microbatches=4,
            seq_length=LENGTH,
            micro_batch_size=1,
            forward_only=False,
        )
        optimizer.step()
        if dist.get_rank() == 0:
            values = {name: round(float(value), 3) for name, value in handle.metrics.items()}
            print(f"step {step}: {values}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
