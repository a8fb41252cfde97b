"""How far the window `streaming` chooses as `step` does: share of samples that both choose.

    python benchmarks/streaming.py      # about 2 minutes on one core

The demo's model, trained a little on its pretraining text, goes on with data-regularised steps:
topk, each matrix by itself, of 8 microbatches of 8 general sentences (a tenth Spanish) beside 8
Spanish target sentences. In every step both windows weigh the same samples at the same parameters;
the update is that of `step`. `microbatch`, which has no memory, is the third. Agreement is the
share of the step window's choice that the other one makes too, over all matrices; a choice at
random would agree in f of them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import sketch_gradients as demo
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.layer_rows.immediate import Immediate

STEPS, SKIP, MICROBATCHES, SAMPLES, TARGET = 60, 10, 8, 8, 8
FRACTIONS = (0.25, 0.5)
Chosen = dict[tuple[int, int], torch.Tensor]  # (block, microbatch) -> [samples], bool


def forward_step(data: Any, model: Any) -> Any:
    batch = next(data)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    mask = batch["loss_mask"]

    def loss(output: torch.Tensor) -> Any:
        total, tokens = (output * mask).sum(), mask.sum().int()
        return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}

    return losses, loss


class Model:
    """The trained model with Megatron's buffers and optimizer."""

    def __init__(self, progress: Progress) -> None:
        model = demo.build()
        task = progress.add_task("training the model", total=demo.STEPS)
        demo.train(model, lambda step, _: progress.update(task, completed=step))
        model.model_type = ModelType.encoder_or_decoder
        self.config = model.config
        self.config.calculate_per_token_loss = True
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.chunks = [DistributedDataParallel(self.config, ddp, model)]
        self.optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3), self.chunks)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.state = {k: v.clone() for k, v in model.state_dict().items() if v is not None}

    def chosen(self, handle: Any, general: list[Any], target: Any) -> Chosen:
        """Run a step's gradients with a window; which samples each matrix takes."""
        found: Chosen = {}
        stock = Immediate.coefficients

        def observed(mode: Any, place: Any, microbatch: int, uses: Any) -> torch.Tensor:
            coefficient_N = stock(mode, place, microbatch, uses)
            found[place.block, microbatch] = coefficient_N > 0
            return coefficient_N

        Immediate.coefficients = observed  # type: ignore[method-assign]
        self.chunks[0].zero_grad_buffer()
        try:
            handle.step(
                get_forward_backward_func(), forward_step_func=forward_step,
                data_iterator=iter(general), model=self.chunks[0], num_microbatches=MICROBATCHES,
                seq_length=demo.LENGTH, micro_batch_size=SAMPLES, forward_only=False,
                target_data_iterator=iter([target]), num_target_microbatches=1,
                target_micro_batch_size=TARGET,
            )  # fmt: skip
        finally:
            Immediate.coefficients = stock  # type: ignore[method-assign]
        if handle.rows.coefficients is not None:
            for microbatch, blocks in enumerate(handle.rows.coefficients):
                found |= {(b, microbatch): row > 0 for b, row in enumerate(blocks)}
        return found


def agreement(one: Chosen, other: Chosen) -> float:
    both = sum(int((one[key] & other[key]).sum()) for key in one)
    return both / max(1, sum(int(v.sum()) for v in one.values()))


def measure(model: Model, fraction: float, progress: Progress) -> dict[str, list[float]]:
    """Agreement with the step window, and the share that each window keeps, by step."""
    model.chunks[0].module.load_state_dict(model.state, strict=False)
    general, target = demo.Text("general", seed=3), demo.Text("target", seed=3)
    out: dict[str, list[float]] = {"streaming": [], "microbatch": [], "streaming keeps": []}
    thresholds = None
    task = progress.add_task(f"f = {fraction}", total=STEPS)
    for _ in range(STEPS):
        batches = [general.next(SAMPLES) for _ in range(MICROBATCHES)]
        goal, found = target.next(TARGET), {}
        for window in ("streaming", "microbatch", "step"):
            dr = DRConfig(
                set="topk", fraction=fraction, alpha=0.0, norm="tokens", rows="sample",
                blocks="matrix", score="exact", window=window,  # type: ignore[arg-type]
            )  # fmt: skip
            with megatron_dr.attach(model.chunks, model.optimizer, model.config, dr) as handle:
                if window == "streaming" and thresholds is not None:
                    handle.load_state_dict({"steps": 0, "dial": thresholds})
                found[window] = model.chosen(handle, batches, goal)
                if window == "streaming":
                    thresholds = handle.state_dict()["dial"]
        model.optimizer.step()  # the last gradient is the step window's
        for window in ("streaming", "microbatch"):
            out[window].append(agreement(found["step"], found[window]))
        kept = torch.cat([v.float() for v in found["streaming"].values()])
        out["streaming keeps"].append(float(kept.mean()))
        progress.advance(task)
    return out


def main() -> None:
    torch.set_num_threads(1)
    console = Console()
    table = Table(title=f"Agreement with the step window over steps {SKIP + 1} to {STEPS}")
    for column in ("f", "streaming", "microbatch", "at random", "share that streaming keeps"):
        table.add_column(column)
    with Progress(console=console) as progress:
        model = Model(progress)
        rows = [(f, measure(model, f, progress)) for f in FRACTIONS]
    for fraction, found in rows:
        cells = [f"{np.mean(found[k][SKIP:]):.3f}" for k in ("streaming", "microbatch")]
        keeps = found["streaming keeps"][SKIP:]
        table.add_row(f"{fraction}", *cells, f"{fraction:.3f}",
                      f"{np.mean(keeps):.3f} ± {np.std(keeps):.3f}")  # fmt: skip
    console.print(table)
    console.print(f"[dim]{Path(__file__).name}: {MICROBATCHES} microbatches of {SAMPLES}[/dim]")


if __name__ == "__main__":
    main()
