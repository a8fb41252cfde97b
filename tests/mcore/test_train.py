"""The training entry: Megatron's own loop on two ranks, with the plugin's flags."""

import json
import os
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dr.mcore.compat import versions
from megatron_dr.mcore.loop import adaptor, first_line

from ._pairs import some
from ._ranks import run_ranks
from ._train import MODEL, cone, data, flags, launch, losses, run

__all__ = ["data"]


def test_both_roles_are_trained_logged_and_validated(data: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code, out, _ = run(flags(data, f"{cone(data)} --dr-metrics {path}"))[1]
    assert code == 0
    assert re.search(r"iteration +6/.*lm loss: .*target loss: .*dr residual: .*dr solve ms: ", out)
    assert re.search(r"validation loss at iteration 6 .*lm loss value.*target loss value", out)
    trained = losses(path, "train")
    assert list(trained) == [1, 2, 3, 4, 5, 6]
    printed = [[float(v) for v in re.findall(rf" {name} loss: (\S+)", out)]
               for name in ("lm", "target")]  # fmt: skip
    expected = [pytest.approx(pair, rel=1e-6) for pair in trained.values()]
    assert list(zip(*printed, strict=True)) == expected
    assert trained[6][0] < trained[1][0] and trained[6][1] < trained[1][1]
    assert list(losses(path, "validation")) == [3, 6]


def test_validation_has_microbatches_of_its_own(data: dict[str, str], tmp_path: Path) -> None:
    """Tensor-parallel peers make room for them, and not for those of training."""
    found = []
    for world, layout in ((1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel")):
        path = tmp_path / f"{world}.jsonl"
        more = f"""{cone(data)} {layout} --dr-metrics {path} --eval-interval 1 --lr 0 --seed 3
            --eval-micro-batch-size 4 --eval-global-batch-size 8"""
        code, _, error = run(flags(data, more, 1), world)[-1]
        assert code == 0, error
        found.append(losses(path, "validation")[1])
    assert found[1] == pytest.approx(found[0], rel=0.02)  # tensor parallel ranks draw by themselves


def test_no_validation_needs_no_flags_for_it(data: dict[str, str]) -> None:
    """Of so small a file the default split leaves a validation set without samples."""
    model = re.sub(r"--eval-iters 1 --eval-interval 3", "", MODEL)
    for flag, ranks in (("--eval-iters 0 --data-path", 1), ("--dr-set mean --train-data-path", 2)):
        argv = f"{model} --train-iters 2 {flag} {data['general']}".split()
        code, out, error = run(argv, ranks)[-1]
        assert code == 0, error
        assert re.search(r"iteration +2/", out) and "validation loss" not in out
    argv += ["--dr-target-valid-data", data["held_out"]]
    code, _, error = run(argv, 1)[0]
    assert code == 2 and "--dr-target-valid-data is evaluated as the general" in error


LAYOUTS = {
    "tp2-sp": ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
    "pp2": ("--pipeline-model-parallel-size 2", 2),
    "cp2-token": ("--context-parallel-size 2 --calculate-per-token-loss", 2),
}


@pytest.mark.parametrize("layout, world", some(LAYOUTS, "tp2-sp"))
def test_layouts_train_alike(data: dict[str, str], tmp_path: Path, layout: str, world: int) -> None:
    """One data rank with 4 slots of 2 sequences, whatever lies below it.

    All start from the checkpoint of one process: Megatron draws parameters by stage.
    """
    base = tmp_path / "base"
    # 272 rows of vocabulary for one rank and for two
    padding = "--make-vocab-size-divisible-by 136"
    assert run(flags(data, f"{padding} --save {base} --save-interval 1", 1), 1)[0][0] == 0
    token = "--calculate-per-token-loss" if "token" in layout else ""
    found = []
    for number, (more, ranks) in enumerate(((token, 1), (layout, world))):
        path = tmp_path / f"metrics{number}.jsonl"
        more += f""" {padding} {cone(data)} --dr-slots 4 --dr-metrics {path}
            --load {base} --finetune --no-load-optim --no-load-rng"""
        code, _, error = run(flags(data, more, 3), ranks)[-1]
        assert code == 0, error
        found.append(losses(path, "train"))
    assert found[0].keys() == found[1].keys()
    for step, expected in found[0].items():
        assert found[1][step] == pytest.approx(expected, rel=2e-4)


def test_resumed_run_equals_uninterrupted_one(data: dict[str, str], tmp_path: Path) -> None:
    """Weights, optimizer, the places of both streams and the sketches' steps come back."""
    whole, parts, folder = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "saved"
    assert run(flags(data, f"{cone(data)} --dr-metrics {whole}"))[0][0] == 0
    more = f"{cone(data)} --dr-metrics {parts} --save {folder} --save-interval 3"
    assert run(flags(data, f"{more} --exit-interval 3"))[0][0] == 0
    code, out, error = run(flags(data, f"{more} --load {folder}"))[0]
    assert code == 0, error
    assert "successfully loaded checkpoint" in out
    expected, found = losses(whole, "train"), losses(parts, "train")
    assert list(found) == [1, 2, 3, 4, 5, 6]
    for step in expected:
        assert found[step] == pytest.approx(expected[step], rel=1e-6)
    _nothing_is_left_to_train(flags(data, f"{more} --load {folder}"), folder)


@pytest.mark.soak
def test_instances_of_the_optimizer_resume_and_overlap(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Two of two ranks each, which make two rows."""
    dr = cone(data).replace("--dr-slots 2", "--dr-rows rank --dr-gram exact")
    more = f"{dr} --num-distributed-optimizer-instances 2 --dr-metrics {tmp_path}"
    saved = f"--save {tmp_path} --save-interval 2"
    for name, also in (
        ("whole", saved), ("overlap", "--overlap-grad-reduce"),
        ("parts", f"--load {tmp_path} --ckpt-step 2 {saved}"),
    ):  # fmt: skip
        code, _, error = run(flags(data, f"{more}/{name}.jsonl {also}", 4), world=4)[0]
        assert code == 0, error
    whole, overlap, parts = (
        losses(tmp_path / f"{name}.jsonl", "train") for name in ("whole", "overlap", "parts")
    )
    assert parts == {step: whole[step] for step in (3, 4)}
    for step, expected in whole.items():
        assert overlap[step] == pytest.approx(expected, rel=1e-4)


MEGATRONS = {
    "--save {tmp}": "Megatron refuses these arguments: it needs `args.save_interval is not None`",
    "--recompute-granularity full": "Megatron refuses these arguments: ",  # by its configuration
    "--num-distributed-optimizer-instances 3": "3 must divide the 2 data x context ranks"
    if versions.INSTALLED > (0, 18)
    else "with megatron-core 0.18, whose training loop",
    "--lr-warmup-iters 10": "--lr-warmup-iters 10 must be from 0 and shorter than --train-iters 6",
}


@pytest.mark.parametrize("more", MEGATRONS)
def test_what_megatron_refuses_is_a_sentence(
    more: str, data: dict[str, str], tmp_path: Path
) -> None:
    (code, _, error), (other, *_) = run(flags(data, f"{cone(data)} {more.format(tmp=tmp_path)}"))
    assert code == other == 2
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and MEGATRONS[more] in said[0]


def _nothing_is_left_to_train(again: list[str], folder: Path) -> None:
    """A complete run says so with exit code 0; one whose last checkpoint is unknown is none."""
    (code, out, error), _ = run(again)
    assert code == 0, error
    assert f"megatron_dr: {folder} is complete: it has 6 iterations of 6" in out
    (folder / "latest_checkpointed_iteration.txt").write_text("")
    (code, _, error), (other, *_) = run(again)
    assert code == other == 2 and "latest_checkpointed_iteration.txt: it is empty, where" in error


def test_validation_sets_of_their_own(data: dict[str, str], tmp_path: Path) -> None:
    """Each has a line, and the held-out target is the same in all of them."""
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other.jsonl"
    other.write_text("".join(Path(data["general"]).read_text().splitlines(keepends=True)[-8:]))
    more = f"""--valid-data-path {data["held_out"]} {other} --multiple-validation-sets
        --full-validation --eval-interval 1 --lr 0 --dr-target-valid-data {data["held_out"]}
        --validation-set-names held_out other --dr-metrics {path} --global-batch-size 2"""
    code, out, error = run(flags(data, more, 1), 1)[0]
    assert code == 0, error
    assert "validation-held_out loss at" in out and "validation-other loss at" in out
    held_out, others = (losses(path, f"validation-{n}")[1] for n in ("held_out", "other"))
    assert held_out[0] == pytest.approx(held_out[1]) and others[0] != pytest.approx(held_out[0])
    assert others[1] == held_out[1]


@pytest.mark.parametrize("more", ["", "--dr-dpo-beta 0.1"])
def test_a_loss_that_is_not_finite_ends_the_run(
    data: dict[str, str], tmp_path: Path, more: str
) -> None:
    """As in Megatron's own script, whatever is trained on."""
    pairs = tmp_path / "pairs.jsonl"
    pair = {"prompt": "a", "chosen": " b", "rejected": " c"}
    pairs.write_text((json.dumps(pair) + "\n") * 8)
    if more:
        data = {**data, "general": str(pairs), "held_out": str(pairs)}
    argv = flags(data, f"{more} --dr-set mean --lr 1e19 --eval-iters 0", 4)
    with pytest.raises(AssertionError, match="the loss of a microbatch is (NaN|infinite)"):
        run(argv, 1)


def test_target_larger_than_its_set_is_noted(data: dict[str, str]) -> None:
    more = cone(data).replace("--dr-target-batch-size 4", "--dr-target-batch-size 8")
    code, out, _ = run(flags(data, more, 1))[0]
    assert code == 0
    assert "target batch (8) is larger than the target set (6): samples repeat" in out


def test_without_our_flags_megatron_runs_as_if_we_were_not_there(data: dict[str, str]) -> None:
    def plain(installed: bool) -> list[str]:
        from megatron.training import training

        os.environ["MEGATRON_DR_DEVICE"] = "cpu"
        stock, seen = training.training_log, []

        def watched(found: dict[str, torch.Tensor], *rest: Any, **kwargs: Any) -> Any:
            seen.extend(float(loss) for loss in found.values())
            return stock(found, *rest, **kwargs)

        training.training_log = watched
        if not installed:
            adaptor.enable = lambda: None
        argv = [f for f in flags(data, "", 3) if f not in ("--dr-device", "cpu")]
        code, out, error = launch(argv)
        assert code == 0, error
        assert adaptor._run is None
        printed = [float(v) for v in re.findall(r" lm loss: (\S+)", out)]
        assert printed == (pytest.approx(seen) if printed else [])  # the last rank prints
        return re.findall(r"lm loss: \S+|grad norm: \S+", out)

    ours, stock = run_ranks(2, plain, True)[1], run_ranks(2, plain, False)[1]
    assert len(ours) == 6 and ours == stock


INTERVALS = [(1, 1, False), (1, 10, True), (12, 10, True), (20, 10, False)]


@pytest.mark.parametrize("iteration, interval, keeps", INTERVALS)
def test_an_interval_that_ends_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, iteration: int, interval: int, keeps: bool
) -> None:
    """Also where a resumed process begins with its last iteration."""
    monkeypatch.setattr("megatron.training.get_args", lambda: Namespace(log_interval=interval))
    said = dict[str, bool]()
    stock = lambda *_, **kwargs: said.update(kwargs)  # noqa: E731
    first_line.log(stock, {}, {}, 0.1, iteration, 1.0, is_first_iteration=True)
    assert said == {"is_first_iteration": keeps}


WRONG_LINE = '{"text": "good"}\n{"prompt": "no response"}\n'
BAD = {
    "no target file": ("--dr-target-data {tmp}/none.jsonl", "none.jsonl: no such file or folder."),
    "empty target": ("--dr-target-data {tmp}/empty.jsonl", "empty.jsonl: the file has no samples."),
    "wrong line": ("--dr-target-data {tmp}/wrong.jsonl", "wrong.jsonl:2: a record must have"),
    "no indexed target": ("--dr-target-data {tmp}/none", "none: no such data"),
    "target batch": (
        "--dr-target-data {target} --dr-target-batch-size 3",
        "--dr-target-batch-size 3 is not a multiple of --micro-batch-size x data-parallel size = 2",
    ),
    "slots": ("--dr-target-data {target} --dr-slots 3", "can't be divided into 3 slots"),
    "too few rows": (
        "--dr-target-data {target} --dr-slots 4 --dr-set topk --dr-fraction 0.05",
        "needs at least 20 rows, but a step has 8",
    ),
    "dial": ("--dr-target-data {target} --dr-alpha 1.5", "alpha must be in [0, 1], not 1.5."),
    "contradiction": (
        "--dr-target-data {target} --dr-rows rank --dr-slots 4",
        "--dr-slots has no meaning with --dr-rows rank",
    ),
    "no target": ("--dr-set cone", "--dr-set cone needs --dr-target-data"),
    "of another script": (
        "--dr-target-data {target} --fim-data",
        "megatron_dr.train does not act on --fim-data (it does not fill in middles",
    ),
    "no folder for checkpoints": (
        "--dr-target-data {target} --dr-slots 4 --save {target}/saved --save-interval 1",
        "saved: checkpoints can't be written there",
    ),
    "ramp-up": (
        "--dr-target-data {target} --dr-slots 2 --rampup-batch-size 2 2 8",
        "--dr-rows rank",
    ),
    "no general file": (
        "--dr-target-data {target} --dr-slots 4 --train-data-path {tmp}/none.jsonl",
        "none.jsonl: no such file or folder.",
    ),
    "metrics": (
        "--dr-target-data {target} --dr-slots 4 --dr-metrics {target}/m.jsonl",
        "m.jsonl: can't be written",
    ),
    "ids beyond the embedding": (
        "--dr-target-data {target} --dr-slots 4 --padded-vocab-size 128",
        "but the model's embedding 128 rows (--padded-vocab-size)",
    ),
    "checkpoint that runs code": (
        "--dr-target-data {target} --dr-slots 4 --load {tmp}/crafted",
        ".metadata: it names posix.mkdir, which no checkpoint of Megatron needs",
    ),
}


class MakesFolder:
    """Unpickling it does."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def craft(folder: Path, made: Path) -> None:
    """A checkpoint of iteration 1 whose description runs code."""
    (folder / "iter_0000001").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "iter_0000001" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(MakesFolder(made)))


@pytest.mark.parametrize("more, sentence", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_sentence_at_start(
    data: dict[str, str], tmp_path: Path, more: str, sentence: str
) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "wrong.jsonl").write_text(WRONG_LINE)
    craft(tmp_path / "crafted", tmp_path / "made")
    (first, out, error), (second, _, other) = run(
        flags(data, more.format(tmp=tmp_path, **data)), world=2
    )
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert len(said) == 1 and sentence in said[0], (said, error[-2000:])
    assert "megatron_dr: error" not in other  # rank 0 alone speaks
    assert first == second == 2
    assert "iteration        1/" not in out and not (tmp_path / "made").exists()
