"""What the plan reads of a run's flags, and Megatron's own numbers beside the plan's."""

import shlex
from typing import Any

import pytest
from megatron.training import theoretical_memory_usage as theirs
from megatron.training.training import num_floating_point_operations

from megatron_dr.mcore.loop import plan_flags
from megatron_dr.plan import activations, asked, flops, memory
from megatron_dr.plan.asked import Asked
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model

MODEL = """--num-layers 4 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
    --group-query-attention --num-query-groups 4 --normalization RMSNorm --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --vocab-size 32000 --hidden-dropout 0 --attention-dropout 0"""
RUN = """--seq-length 512 --max-position-embeddings 512 --micro-batch-size 2 --global-batch-size 32
    --train-iters 10 --lr 1e-5 --bf16 --use-distributed-optimizer"""
TARGET = "--dr-target-data /no/where --dr-target-batch-size 16"


def read(flags: str, gpus: int = 8, sweep: bool = False) -> Asked:
    return plan_flags.read(shlex.split(f"{MODEL} {RUN} {flags}"), gpus, sweep)


def args_of(flags: str, gpus: int = 1) -> Any:
    args = plan_flags._validated(shlex.split(f"{MODEL} {RUN} {flags}"), gpus, False)[0]
    args.padded_vocab_size = plan_flags._model(args).padded(args.tensor_model_parallel_size)
    return args


def test_sizes() -> None:
    found = read("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2")
    assert found.model == Model(4, 1024, 16, 4, 2816, 32000, 64)
    assert found.layout == Layout(
        dp=2, tp=2, cp=2, sequence_parallel=True, overlap=False, overlap_gather=False
    )
    assert (found.batch, found.target_batch, found.wanted) == (32, 0, None)
    assert found.kept.fused and found.kept.rotary and not found.kept.dropout


def test_target() -> None:
    run, said = asked.settle(read(TARGET), H100)
    assert (run.general, run.target) == (2, 1)
    assert run.rows is not None and run.rows.halves and run.rows.of(run.layout).rows == 8
    assert said[0] == "rows auto: 8 rows of 1 rank (at least 8)"
    other, said = asked.settle(read(f"{TARGET} --dr-slots 2 --dr-gram exact"), H100)
    assert other.rows is not None and (other.rows.slots, said) == (2, [])
    some = asked.settle(read(f"{TARGET} --dr-target-ranks 4 --dr-alpha 0.1"), H100)[0]
    assert (some.general, some.target) == (4, 2)
    assert asked.plain_of(some).general == 2


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--num-layers x", "argument --num-layers: invalid int value: 'x'"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--tensor-model-parallel-size 3", "Megatron refuses"),
        ("--optimizer sgd", "does not know --optimizer sgd"),
        ("--dr-alpha 0.1", "--dr-set or --dr-target-data"),
        (f"{TARGET} --dr-rows sample", "--dr-rows sample"),
        (f"{TARGET} --dr-lora-rank 8", "does not know --dr-lora"),
        ("--position-embedding-type learned_absolute", "learned_absolute"),
        ("--mtp-num-layers 1", "--mtp-num-layers"),
        (f"{TARGET} --dr-target-batch-size 15", "--dr-target-batch-size 15 is not a multiple"),
    ],
)
def test_refused(flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        read(flags)
    assert "\n" not in str(refusal.value)


EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 512 --moe-router-topk 2 --moe-grouped-gemm"


def test_experts_that_the_gpus_have_no_room_for() -> None:
    sizes = "--num-experts 16 --moe-router-topk 2 --tensor-model-parallel-size 2 "
    more = "--sequence-parallel --expert-model-parallel-size"
    for target in ("", TARGET):
        with pytest.raises(ValueError, match="experts need 32 ranks for a copy .* the 16 GPUs"):
            read(f"{sizes} {more} 16 {target}", 16)
    assert read(f"{sizes} {more} 16 --expert-tensor-parallel-size 1", 16).layout.ep == 16


@pytest.mark.parametrize("flags", ["", EXPERTS])
def test_operations_of_the_general_batch(flags: str) -> None:
    """As Megatron counts them; of a target batch as much a sequence, which Megatron leaves out."""
    run = asked.settle(read(f"{TARGET} {flags}"), H100)[0]
    mine = run.operations()
    assert mine["general"] == pytest.approx(num_floating_point_operations(args_of(flags), 32))
    assert mine["target"] == pytest.approx(mine["general"] / 2)


def test_operations_of_packed_samples() -> None:
    """64 samples of 256 tokens in 32 sequences of 512."""
    args, tokens = args_of(""), flops.of_sequences(32, 512, 256)
    found = read("")
    number = num_floating_point_operations(args, 32, 64 * 256**2, 64 * 256)
    assert 3 * flops.forward(found.model, found.layout, tokens) == pytest.approx(number)


@pytest.mark.parametrize("dp", [1, 8])
def test_weights_and_optimizer(dp: int) -> None:
    """Where Megatron's estimate is right: one stage; it leaves padding out."""
    found, args = read("", dp), args_of("", dp)
    args.world_size, args.data_parallel_size = dp, dp
    (stage,) = stages(found.model, found.layout)
    mine = sum(memory.plain(stage).values())
    assert mine == pytest.approx(theirs.compute_weight_and_optimizer_memory(args), rel=1e-3)


def test_activations_where_megatron_s_estimate_is_right() -> None:
    """As many key heads as query heads, GELU, no rotary embedding, sequences split."""
    flags = """--num-query-groups 16 --normalization LayerNorm --position-embedding-type none
        --hidden-dropout 0.1 --recompute-granularity selective --tensor-model-parallel-size 2
        --sequence-parallel"""
    own = MODEL.replace("--swiglu", "")
    words = shlex.split(f"{own} {RUN} {flags}")
    found, args = plan_flags.read(words, 2), plan_flags._validated(words, 2, False)[0]
    args.padded_vocab_size = found.model.padded(2)
    (stage,) = stages(found.model, found.layout)
    mine = activations.of_stage(stage, found.kept, 1, with_logits=False)
    estimate = theirs.compute_activation_memory(args, 1)
    assert sum(mine.values()) == pytest.approx(estimate, rel=0.01)


def test_a_run_on_cpus() -> None:
    """With the layers and the kernels that it has there."""
    found = read("--dr-device cpu --tensor-model-parallel-size 2")
    assert not found.kept.fused and found.layout.tp == 2


def test_blocks_and_slots() -> None:
    found = read(f"{TARGET} --dr-blocks layer --dr-slots 4 --dr-slot-dtype bf16 --dr-alpha 0.1")
    assert found.wanted is not None and not found.wanted.auto
    rows = found.wanted.rows
    assert (rows.blocks, rows.slots, rows.slot_bytes, rows.halves) == (4 + 3, 4, 2, False)


def test_a_sweep_reads_no_sizes() -> None:
    sizes = """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
        --num-layers-per-virtual-pipeline-stage 1"""
    found = read(sizes, 12, True)
    assert (found.layout.world, found.batch) == (1, 32)
