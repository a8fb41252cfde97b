"""Megatron's model at some size on this process alone, and its steps.

Megatron's fusions by torch.compile are off, in plain Megatron's steps too: compiling them would
take the minutes that are measured. Attention is torch's flash attention, or Transformer Engine's.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.attach import Handle, attach
from megatron_dr.mcore.cpu.layers import layer_spec
from megatron_dr.mcore.layer_rows.taps import te
from megatron_dr.mcore.ownership import OwnedParameter, owned_parameters

Batch = dict[str, Tensor]
_HAS_KERNEL = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of a step: sequences of a microbatch, microbatches of each role."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocabulary: int
    sequence: int
    micro_batch: int
    general: int
    target: int


SMALL = Sizes(2, 32, 48, 4, 2, 64, 16, 2, 4, 2)
CHECK = Sizes(2, 256, 512, 4, 2, 1024, 256, 4, 4, 2)
LARGE = Sizes(16, 2048, 8192, 32, 8, 32768, 4096, 2, 4, 1)  # 1.1 billion parameters


class Attention(torch.nn.Module):
    """softmax(Q K^T / sqrt(d)) V, causal, without a mask in memory; Megatron's [s, b, heads, d]."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Model:
    """Model, DDP, distributed optimizer, and the plugin while it is attached.

    Args:
        layers: `local` (Megatron's own) or `te` (Transformer Engine's).
        dtype: fp32, bf16 or fp8 (tensorwise scales: no history, so that a row by itself is
            quantised as in a step).

    Attributes:
        watch: called with each forward's output.
    """

    def __init__(self, sizes: Sizes, device: torch.device, layers: str, dtype: str) -> None:
        self.sizes, self.device = sizes, device
        self.config = _config(sizes, layers, dtype, device.type == "cpu")
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        spec = get_gpt_layer_with_transformer_engine_spec() if layers == "te" else _local(self)
        model = GPTModel(
            self.config, spec, sizes.vocabulary, sizes.sequence, position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )  # fmt: skip
        model.model_type = ModelType.encoder_or_decoder
        model = model.to(device) if dtype == "fp32" else model.to(device).bfloat16()
        if layers == "te" and not _HAS_KERNEL:
            _fuse(model)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True,
        )  # fmt: skip
        self.chunks = [DistributedDataParallel(self.config, ddp, model)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.0, bf16=dtype != "fp32",
                            params_dtype=self.config.params_dtype, use_distributed_optimizer=True),
            self.chunks,
        )  # fmt: skip
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.no_sync_func = self.chunks[0].no_sync
        self.handle: Handle | None = None
        self.watch: Callable[[Tensor], None] = lambda _: None
        self._owned = owned_parameters(self.chunks, self.config)

    # -- the plugin ------------------------------------------------------------------------------
    def attach(self, dr: DRConfig | None) -> None:
        """In place of what was attached; None: plain Megatron."""
        if self.handle is not None:
            self.handle.detach()
        self.handle = None
        if dr is not None:
            self.handle = attach(self.chunks, self.optimizer, self.config, dr)

    @property
    def gradient_bytes(self) -> int:
        return sum(buffer.grad_data.nbytes for buffer in self.chunks[0].buffers)

    @property
    def parameters(self) -> int:
        return sum(o.parameter.numel() for o in self._owned)

    # -- steps -----------------------------------------------------------------------------------
    def gradients(self, general: Sequence[Batch], target: Sequence[Batch] = ()) -> None:
        """A step up to the optimizer: the gradients are in Megatron's buffers."""
        self.zero()
        schedule: dict[str, Any] = {
            "forward_step_func": self._forward, "data_iterator": iter(general),
            "model": self.chunks, "num_microbatches": len(general),
            "seq_length": self.sizes.sequence, "micro_batch_size": self.sizes.micro_batch,
            "forward_only": False,
        }  # fmt: skip
        if self.handle is None:
            get_forward_backward_func()(**schedule)
            return
        self.handle.step(
            get_forward_backward_func(), target_data_iterator=iter(target),
            num_target_microbatches=len(target), **schedule,
        )  # fmt: skip

    def zero(self) -> None:
        self.chunks[0].zero_grad_buffer()
        self.optimizer.zero_grad()

    def read(self) -> dict[str, Tensor]:
        """A copy of each parameter's gradient, in float64 on the CPU."""
        return {o.name: _main_grad(o).detach().cpu().double() for o in self._owned}

    def alone(self, parts: Sequence[tuple[Batch, Tensor]]) -> dict[str, Tensor]:
        """The gradient of the sum of token losses x weights [samples, tokens], by autograd."""
        self.zero()
        self.chunks[0].module.set_is_first_microbatch()  # or layers keep quantised weights
        with self.chunks[0].no_sync():
            for batch, weight in parts:
                (self._losses(self.chunks[0], batch) * weight).sum().backward()
        found = self.read()
        self.zero()
        return found

    def _losses(self, model: Any, batch: Batch) -> Tensor:
        losses: Tensor = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"]
        ).float()
        return losses

    def _forward(self, data: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
        batch = next(data)
        output = self._losses(model, batch)
        self.watch(output)
        return output, partial(_loss, batch["loss_mask"])

    def batches(self, seed: int, number: int) -> list[Batch]:
        """Microbatches of random tokens on the device, whose samples differ in length."""
        samples, length = self.sizes.micro_batch, self.sizes.sequence
        generator, out = torch.Generator().manual_seed(seed), []
        position = torch.arange(length)
        for n in range(number):
            shape = (samples, length + 1)
            text = torch.randint(0, self.sizes.vocabulary, shape, generator=generator)
            ends = length - (torch.arange(samples) * 3 + n) % (length // 2)
            batch = {
                "tokens": text[:, :-1].contiguous(), "labels": text[:, 1:].contiguous(),
                "position_ids": position.expand(samples, -1).contiguous(),
                "loss_mask": (position < ends[:, None]).float(),
            }  # fmt: skip
            out.append({name: value.to(self.device) for name, value in batch.items()})
        return out


def _config(sizes: Sizes, layers: str, dtype: str, on_cpu: bool) -> TransformerConfig:
    low = dtype != "fp32"
    return TransformerConfig(
        num_layers=sizes.layers, hidden_size=sizes.hidden, ffn_hidden_size=sizes.ffn,
        num_attention_heads=sizes.heads, num_query_groups=sizes.groups, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        bf16=low, params_dtype=torch.bfloat16 if low else torch.float32,
        pipeline_dtype=torch.bfloat16 if low else torch.float32,
        fp8="hybrid" if dtype == "fp8" else None,
        fp8_recipe="tensorwise" if dtype == "fp8" else "delayed",
        use_cpu_initialization=on_cpu, persist_layer_norm=False,
        gradient_accumulation_fusion=layers == "te" and _HAS_KERNEL,
        hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip


def _local(model: Model) -> Any:
    """Megatron's local layers, with attention that needs no memory for its mask."""
    block = layer_spec(model.config)
    block.layer_specs[0].submodules.self_attention.submodules.core_attention = Attention
    return block


def _fuse(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add to main_grad, as sample rows need. Megatron's flag for it
    would ask the output layer, which is Megatron's own, for apex's kernel."""
    for module in model.modules():
        if te.is_linear(module):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def _main_grad(owned: OwnedParameter) -> Tensor:
    gradient: Tensor = owned.parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def _loss(mask: Tensor, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, count = (output * mask).sum(), mask.sum().to(torch.int)
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}
