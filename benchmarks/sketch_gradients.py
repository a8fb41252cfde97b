"""Gradients of a trained model for the sketch benchmarks: Megatron-Core's GPT on a CPU.

The model is that of `examples/sft/demo.py` (about 0.5M parameters), trained a little on that
demo's pretraining text. A batch is M rows, each the gradient of one sentence of the general pool
(a tenth of which is Spanish), and the target, the gradient of 8 Spanish sentences.

Legend: M rows, R = M + 1 (the target last), N elements.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import Progress

from megatron_dr.data.file_samples import FileSamples
from megatron_dr.data.order import EpochOrder
from megatron_dr.mcore import cpu

cpu.enable()  # before Megatron is imported

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_dr.mcore.cpu.layers import layer_spec  # noqa: E402

SFT = Path(__file__).resolve().parent.parent / "examples" / "sft"
# GPTModel logs in three lines that it is deprecated
logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)

LENGTH, ROWS, TARGET = 64, 16, 8
STEPS, BATCH, PEAK, WARM_UP = 150, 32, 3e-3, 20  # of the training before; PEAK: learning rate

Gradients = dict[str, torch.Tensor]  # parameter's name -> [R, N], float32


def batches(count: int, progress: Progress) -> list[Gradients]:
    """Train the model and take `count` batches of gradients."""
    torch.set_num_threads(1)
    model = build()
    task = progress.add_task("training the model", total=STEPS + count)

    def report(step: int, loss: float) -> None:
        text = f"training the model, {loss:.2f} nats/byte"
        progress.update(task, completed=step, description=text)

    train(model, report)
    general, target, out = Text("general", seed=1), Text("target", seed=1), []
    for _ in range(count):
        out.append(gradients(model, general, target))
        progress.advance(task)
    return out


class Text:
    """Sentences of the demo's files, in a seeded order, as Megatron's batches."""

    def __init__(self, name: str, seed: int) -> None:
        self.samples = FileSamples(str(SFT / "data" / f"{name}.jsonl"), _Tokenizer(), LENGTH)
        self.order, self.place = EpochOrder(len(self.samples), seed), 0

    def next(self, count: int) -> dict[str, torch.Tensor]:
        chosen = [self.samples[self.order[self.place + i]] for i in range(count)]
        self.place += count
        return {name: torch.stack([s[name] for s in chosen]) for name in chosen[0]}


class _Tokenizer:
    """The demo's tokenizer, as `FileSamples` wants it."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_file(str(SFT / "tokenizer" / "tokenizer.json"))
        self.eod: int = self.tokenizer.token_to_id("<|end|>")

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids


def build() -> GPTModel:
    """The demo's model in one process, with random parameters."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2, hidden_size=128, num_attention_heads=4, ffn_hidden_size=384,
        normalization="RMSNorm", gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    return GPTModel(
        config, layer_spec(config), vocab_size=264, max_sequence_length=LENGTH,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip


def train(model: GPTModel, report: Callable[[int, float], Any]) -> None:
    """Adam on the pretraining text; `report(steps done, loss)` after each step."""
    text = Text("pretrain", seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
        optimizer.zero_grad()
        loss = mean_loss(model, text.next(BATCH))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, loss.item())


def mean_loss(model: GPTModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Nats per token."""
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def gradients(model: GPTModel, general: Text, target: Text) -> Gradients:
    """M rows of one sentence each and, last, the target: [R, N] of every parameter."""
    rows = [gradient(model, general.next(1)) for _ in range(ROWS)]
    rows.append(gradient(model, target.next(TARGET)))
    return {name: torch.stack([r[name] for r in rows]) for name in rows[0]}


def gradient(model: GPTModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Flat gradient of every parameter, in float32."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(mean_loss(model, batch), list(parameters.values()))
    return {name: g.reshape(-1) for name, g in zip(parameters, grads, strict=True)}
