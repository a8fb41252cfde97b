"""A training script of one's own with `enable()`: the same flags as `megatron_dr.train`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.mcore import compat, cpu
from megatron_dr.mcore.loop import adaptor, forward

from ._ranks import run_ranks
from ._train import cone, data, flags, launch, losses

__all__ = ["data"]

LAYOUTS = {
    "tp2-sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "packs": ("--dr-pack", 1),
}


def script(argv: list[str]) -> int:
    """As Megatron's pretrain_gpt.py goes about it. How often its own forward step was called."""
    from megatron.training.arguments import parse_and_validate_args

    calls = []

    def own_step(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        calls.append(model)
        return forward.forward_step(data_iterator, model)

    def own_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
        raise AssertionError("Megatron's datasets were asked for files of samples")

    own_datasets.is_distributed = True  # type: ignore[attr-defined]
    sys.argv = ["pretrain_gpt.py", *argv]
    cpu.enable_if_asked()
    adaptor.enable()
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    compat.pretrain(args, compat.model_config(args), own_datasets, own_step)
    return len(calls)


@pytest.mark.parametrize("layout, world", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_same_flags_give_the_same_losses(
    data: dict[str, str], tmp_path: Path, layout: str, world: int
) -> None:
    """Files of samples, packs, and layouts that Megatron's own layers lack on the CPU."""
    paths = [tmp_path / "script.jsonl", tmp_path / "entry.jsonl"]
    argv = [
        flags(data, f"{cone(data)} {layout} --eval-interval 2 --dr-metrics {path}", 2)
        for path in paths
    ]
    calls = run_ranks(world, script, argv[0])
    code, _, error = run_ranks(world, launch, argv[1])[-1]
    assert code == 0, error
    for kind in ("train", "validation"):
        script_losses, entry_losses = (losses(path, kind) for path in paths)
        assert script_losses and script_losses == entry_losses
    assert all(count == 0 for count in calls) == ("--dr-pack" in layout)
