"""Converted checkpoints trained by Megatron and exported: transformers computes what Megatron does.

Configuration and tokenizer travel with the run's checkpoints, and adapters go to PEFT.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_dr.hf import adapters, from_megatron
from megatron_dr.mcore.loop import train

from . import _train
from ._clean import ROOT, Clean, clean_process
from ._converted import LLAMA3, SIZES, TOKENS, convert, megatron_logits
from ._pairs import some
from ._ranks import run_ranks


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    train.import_megatron()  # once, and not in every rank


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clean]:
    with clean_process(tmp_path_factory.mktemp("clean")) as process:
        yield process


def launch(argv: list[str]) -> tuple[int, str, str, Any]:
    """On a rank: exit code, output, errors, and the rotary frequencies of its model chunks."""
    found: list[torch.Tensor] = []
    stock = RotaryEmbedding.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        found.append(self.inv_freq.clone())

    RotaryEmbedding.__init__ = watched
    return *_train.launch(argv), found


def run(folder: Path, more: str) -> tuple[str, Any]:
    """Two steps from mcore/, saved in saved/: the output and the rotary frequencies of rank 0."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} The fear."}) + "\n" for n in range(20)))
    model = (folder / "mcore" / "hf" / "megatron_flags.txt").read_text()
    argv = f"""--dr-device cpu {model} --load {folder / "mcore"} --save {folder / "saved"}
        --save-interval 2 --train-iters 2 --train-data-path {data} --seq-length 32 --lr 1e-2
        --lr-decay-style constant --tokenizer-type HuggingFaceTokenizer --eval-iters 0
        --tokenizer-model {ROOT / "examples/sft/tokenizer"} --use-distributed-optimizer
        --eval-interval 100 --micro-batch-size 1 --global-batch-size 4 --log-interval 1 {more}"""
    code, out, error, found = run_ranks(2, launch, argv.split())[0]
    assert code == 0, error[-3000:]
    assert "successfully loaded checkpoint" in out
    return out, found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    largest = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * largest)


LAYOUTS = {
    "qwen2": "--tensor-model-parallel-size 2 --sequence-parallel",
    "llama3.2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "mixtral": "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
    "qwen3-moe": "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
}


@pytest.mark.parametrize("name", some({name: name for name in LAYOUTS}, "qwen2", "qwen3-moe"))
def test_training_goes_on_and_its_result_is_exported(
    tmp_path: Path, clean: Clean, name: str
) -> None:
    """TP with sequence parallelism, PP with interleaved stages, and EP; biases, ties, experts."""
    folder, before = convert(name, tmp_path)
    _, frequencies = run(folder, LAYOUTS[name])
    if name == "llama3.2":  # Megatron's own builder would leave the factor at 8
        config = transformers.LlamaConfig(**SIZES | {"rope_parameters": LLAMA3})
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
        assert len(frequencies) == 2
        for found in frequencies:
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert (folder / "saved" / "hf" / "config.json").exists()
    from_megatron.convert(from_megatron.plan(folder / "saved"), tmp_path / "back")
    after = clean.logits(tmp_path / "back", TOKENS)
    assert (after - before).abs().max() > 1e-2  # it has learnt something
    close(run_ranks(1, megatron_logits, folder / "saved", 1, 1)[0], after)


def test_adapters_are_those_of_peft(tmp_path: Path, clean: Clean) -> None:
    """Trained at TP 2; on the base model by PEFT, merged, and in Megatron: the same logits."""
    folder, before = convert("qwen3", tmp_path)
    lora = "--dr-lora-rank 4 --dr-lora-alpha 12 --finetune --tensor-model-parallel-size 2"
    run(folder, f"{lora} --sequence-parallel --lr 5e-2")
    export = from_megatron.plan(folder / "saved")
    assert export.adapters is not None
    base = (export.assets / "base_model.txt").read_text().strip()
    adapters.write(export.adapters, export.tensors, export.dtype, base, tmp_path / "peft")
    from_megatron.convert(export, tmp_path / "merged")
    found = run_ranks(1, megatron_logits, folder / "saved", 1, 1)[0]
    assert (found - before).abs().max() > 1e-2
    close(clean.logits(folder / "hf", TOKENS, tmp_path / "peft"), found)
    close(clean.logits(tmp_path / "peft", TOKENS), found)  # finds the base model by its name
    close(clean.logits(tmp_path / "merged", TOKENS), found)
    values = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(values) == 2 * 7 * 2  # layers, modules, A and B
    code, said = clean.run(ROOT / "tools/verify.py", tmp_path / "merged", folder / "saved")
    assert code == 0 and "they agree" in said, said
