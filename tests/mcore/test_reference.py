"""The reference cases (`tests/reference/cases`) through Megatron's model and the layer path.

Megatron fuses q, k, v and gate, up, so with one selection per matrix only the matrices that it does
not fuse choose as the cases do; with one selection for the model all of them are compared.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

import megatron_dr
from megatron_dr import DRConfig
from megatron_dr.mcore.cpu.layers import layer_spec

from . import _megatron
from ._data import Layout
from ._ranks import run_ranks

CASES = Path(__file__).parents[1] / "reference" / "cases"
HEADS, GROUPS, HEAD, LAYERS, LENGTH = 4, 2, 8, 2, 14
Arrays = dict[str, np.ndarray]


def load(name: str) -> Arrays:
    with np.load(CASES / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def fused(of: Arrays, prefix: str) -> dict[str, torch.Tensor]:
    """Hugging Face's matrices by Megatron's names."""
    w = {k.removeprefix(prefix): torch.from_numpy(v) for k, v in of.items() if k.startswith(prefix)}
    out = {
        "embedding.word_embeddings.weight": w["model.embed_tokens.weight"],
        "output_layer.weight": w["lm_head.weight"],
        "decoder.final_layernorm.weight": w["model.norm.weight"],
    }
    for n in range(LAYERS):
        hf, mine = f"model.layers.{n}.", f"decoder.layers.{n}."
        q, k, v = (w[f"{hf}self_attn.{x}_proj.weight"] for x in "qkv")
        parts = (q.view(GROUPS, -1, 32), k.view(GROUPS, -1, 32), v.view(GROUPS, -1, 32))
        out[mine + "self_attention.linear_qkv.weight"] = torch.cat(parts, 1).flatten(0, 1)
        out[mine + "self_attention.linear_proj.weight"] = w[hf + "self_attn.o_proj.weight"]
        gate_up = [w[f"{hf}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        out[mine + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
        out[mine + "mlp.linear_fc2.weight"] = w[hf + "mlp.down_proj.weight"]
        out[mine + "input_layernorm.weight"] = w[hf + "input_layernorm.weight"]
        out[mine + "pre_mlp_layernorm.weight"] = w[hf + "post_attention_layernorm.weight"]
    return out


def batch(data: Arrays, rows: slice) -> dict[str, torch.Tensor]:
    """Megatron's form: the label of a position is the next token; right padding has no loss."""
    ids, labels = (torch.from_numpy(data[f"merged/{k}"][rows]) for k in ("input_ids", "labels"))
    labels = torch.cat([labels[:, 1:], torch.full((len(labels), 1), -100)], 1)
    return {
        "tokens": ids,
        "labels": labels.clamp(min=0),
        "loss_mask": (labels >= 0).float(),
        "position_ids": torch.arange(LENGTH).expand(len(ids), -1),
    }


def build(layout: Layout, weights: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS,
        kv_channels=HEAD, ffn_hidden_size=96, normalization="RMSNorm", layernorm_epsilon=1e-6,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, calculate_per_token_loss=True,
        tensor_model_parallel_size=layout.tp, sequence_parallel=layout.sequence_parallel,
        use_cpu_initialization=True, gradient_accumulation_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    chunk = GPTModel(
        config, layer_spec(config), vocab_size=96, max_sequence_length=LENGTH,
        position_embedding_type="rope", share_embeddings_and_output_weights=False,
    )  # fmt: skip
    chunk.model_type = ModelType.encoder_or_decoder
    _megatron.load([chunk], config, weights)
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return [DistributedDataParallel(config, ddp, chunk)], config


def forward_step(data_iterator: Any, model: Any) -> Any:
    data = next(data_iterator)
    output = model(data["tokens"], data["position_ids"], None, labels=data["labels"])
    return output, partial(_megatron.loss_func, data["loss_mask"])


def gradients(layout: Layout, dials: dict[str, Any]) -> Any:
    """On a rank: the step's gradients by Megatron's names, in pieces."""
    data = load("model_and_batches")
    _megatron.initialize(layout)
    model, config = build(layout, fused(data, "w/"))
    dr = DRConfig(rows="sample", set="topk", fraction=0.5, norm="tokens", alpha=0.0, **dials)
    handle = megatron_dr.attach(model, None, config, dr)
    model[0].zero_grad_buffer()
    handle.step(
        get_forward_backward_func(), forward_step_func=forward_step, model=model[0],
        data_iterator=iter([batch(data, slice(0, 8))]), num_microbatches=1, seq_length=LENGTH,
        micro_batch_size=8, target_data_iterator=iter([batch(data, slice(8, 10))]),
        num_target_microbatches=1, target_micro_batch_size=2,
    )  # fmt: skip
    assert parallel_state.get_data_parallel_world_size() == 1
    return _megatron.pieces(model, config, "main_grad")


def differences(case: str, layout: Layout, dials: dict[str, Any]) -> dict[str, float]:
    """Relative difference to the case's gradient, by parameter."""
    found = _megatron.whole(run_ranks(layout.world, gradients, layout, dials))
    expected = fused(load(case), "grad/")
    return {
        name: float((found[name] - value.flatten()).norm() / value.norm())
        for name, value in expected.items()
    }


LAYOUTS = {"one": Layout(), "TP 2": Layout(tp=2), "SP": Layout(tp=2, sequence_parallel=True)}
MATRIX = ("linear_proj", "linear_fc2", "word_embeddings", "output_layer")  # fused by neither


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("score", ("ghost", "exact"))
def test_each_matrix_chooses_its_samples(layout: str, score: str) -> None:
    dials = {"blocks": "matrix", "target_pass": "merged", "score": score}
    found = differences("lws_merged_reduced_ghost_topk05", LAYOUTS[layout], dials)
    compared = [name for name in found if any(part in name for part in MATRIX)]
    assert len(compared) == 2 * LAYERS + 2
    for name in compared:
        assert found[name] < 1e-5, f"{name}: {found[name]:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("passes", (1, 2))
def test_the_model_chooses_its_samples(layout: str, passes: int) -> None:
    dials = {"blocks": "model", "score": "ghost", "passes": passes}
    found = differences("gs1_separate_reduced_ghost_topk05", LAYOUTS[layout], dials)
    for name, difference in found.items():
        if "layernorm" in name:  # theirs is of all samples; ours follows the choice
            assert difference > 1e-2
        else:
            assert difference < 1e-5, f"{name}: {difference:.1e}"
