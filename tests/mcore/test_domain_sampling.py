"""--dr-domain-sampling in Megatron's loop: what is read follows the weights, in every way alike."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.report import metrics

from ._datasets import indexed
from ._train import flags, run

LIKE, UNLIKE = "dr share like", "dr share unlike"


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Two corpora with the same prompts; one answers as the target does, one otherwise."""
    answers = {"like": "yes yes yes", "unlike": "no, not so", "target": "yes yes yes"}
    answers |= {"general": "yes yes yes", "held_out": "yes yes yes"}
    paths = {}
    for name, answer in answers.items():
        path = tmp_path / f"{name}.jsonl"
        records = [{"prompt": f"Is {n}? ", "response": answer} for n in range(24)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        paths[name] = str(path)
    return paths


def more(data: dict[str, str], own: str = "") -> str:
    return f"""--train-data-path 0.5 {data["like"]} 0.5 {data["unlike"]} --dr-rows domain
        --dr-target-data {data["target"]} --dr-target-batch-size 4 --eval-iters 0 {own}"""


def trained(path: Path) -> list[dict[str, Any]]:
    """Lines of training steps, without what is measured."""
    return [
        {name: v for name, v in line.items() if not re.search("ms$|seconds|memory|bytes", name)}
        for line in metrics.read(path, "train")
    ]


def test_what_opposes_the_target_loses_its_share_and_a_resume_goes_on(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Stopped within a segment, with workers that read ahead and without: the same bits."""
    own = "--dr-domain-sampling 4 --dr-domain-interval 2 --lr 3e-2"
    whole, parts, save = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl", tmp_path / "save"
    ended = run(flags(data, more(data, f"{own} --num-workers 2 --dr-metrics {whole}"), 9))
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    said = ended[0][1]
    assert "each corpus is read 0.1 to 4 times as much as the blend says" in said
    assert "note: at its least share less than one of a step's 8 units" in said
    lines = trained(whole)
    shares = [line[UNLIKE] for line in lines]
    assert shares[:4] == [0.5] * 4  # of the first weights, two steps after them
    assert all(shares[n] == shares[n + 1] for n in range(0, 8, 2))
    assert 0.05 <= shares[-1] < 0.3 and shares[4] < 0.5
    assert all(line[LIKE] + line[UNLIKE] == pytest.approx(1) for line in lines)
    argv = f"{own} --num-workers 0 --dr-metrics {parts} --save {save} --save-interval 5"
    assert run(flags(data, more(data, f"{argv} --exit-interval 5"), 9))[0][0] == 0
    code, _, error = run(flags(data, more(data, f"{argv} --load {save}"), 9))[0]
    assert code == 0, error
    assert trained(parts) == lines
    sizes = "--micro-batch-size 3 --global-batch-size 12 --dr-target-batch-size 6"
    code, _, error = run(flags(data, more(data, f"{argv} --load {save} {sizes} --ckpt-step 5"), 9))[
        0
    ]
    assert code == 2 and "--dr-rows domain can't resume after 40 samples, not a multiple" in error


def test_bounds_of_one_are_the_run_without_them(data: dict[str, str], tmp_path: Path) -> None:
    found = {}
    for name, own in (("off", ""), ("on", "--dr-domain-sampling 1,1 --dr-domain-interval 2")):
        path = tmp_path / f"{name}.jsonl"
        code, _, error = run(flags(data, more(data, f"{own} --dr-metrics {path}"), 4))[0]
        assert code == 0, error
        found[name] = trained(path)
    assert [line.pop(name) for line in found["on"] for name in (LIKE, UNLIKE)] == [0.5] * 8
    assert found["on"] == found["off"]


@pytest.mark.soak
@pytest.mark.parametrize(
    "layout, world", [("", 1), ("--tensor-model-parallel-size 2 --sequence-parallel", 2),
                      ("--micro-batch-size 2 --num-workers 0", 2)]
)  # fmt: skip
def test_layouts_read_alike(data: dict[str, str], tmp_path: Path, layout: str, world: int) -> None:
    """From one checkpoint; with larger microbatches the order is another one."""
    base, padding = tmp_path / "base", "--make-vocab-size-divisible-by 136"
    own = f"--dr-domain-sampling 4 --dr-domain-interval 2 --lr 3e-2 {padding}"
    assert run(flags(data, f"{padding} --save {base} --save-interval 1", 1), 1)[0][0] == 0
    found = []
    for number, (given, ranks) in enumerate((("", 2), (layout, world))):
        path = tmp_path / f"{number}.jsonl"
        argv = f"""{own} {given} --dr-metrics {path} --load {base} --finetune --no-load-optim
            --no-load-rng"""
        code, _, error = run(flags(data, more(data, argv), 8), ranks)[0]
        assert code == 0, error
        found.append(trained(path))
    assert found[0][-1][UNLIKE] < 0.5
    near = 0.1 if "micro" in layout else 1e-3
    for one, other in zip(*found, strict=True):
        assert other[UNLIKE] == pytest.approx(one[UNLIKE], abs=near)
        assert other["lm loss"] == pytest.approx(one["lm loss"], rel=near)


@pytest.mark.soak
def test_a_resume_with_other_sizes_and_iterations_left_out(
    data: dict[str, str], tmp_path: Path
) -> None:
    """A segment is reached in iterations that read and don't train; then one rank goes on."""
    save, paths = tmp_path / "save", [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    own = f"""--dr-domain-sampling 4 --dr-domain-interval 2 --lr 3e-2 --iterations-to-skip 5 6 7
        --save {save} --save-interval 9"""
    argv = f"{own} --exit-interval 9 --dr-metrics {paths[0]}"
    code, _, error = run(flags(data, more(data, argv), 14))[0]
    assert code == 0, error
    for ranks, path in ((1, paths[1]), (2, tmp_path / "again.jsonl")):
        argv = f"{own} --load {save} --ckpt-step 9 --dr-metrics {path}"
        code, _, error = run(flags(data, more(data, argv), 14), ranks)[0]
        assert code == 0, error
    one, two, again = trained(paths[0]), trained(paths[1]), trained(tmp_path / "again.jsonl")
    assert [line["iteration"] for line in one] == [1, 2, 3, 4, 8, 9]
    assert [line["iteration"] for line in two] == [10, 11, 12, 13, 14]
    assert two[0][UNLIKE] == again[0][UNLIKE] < 0.5
    for a, b in zip(two, again, strict=True):
        assert a[UNLIKE] == pytest.approx(b[UNLIKE], abs=1e-3)
        assert a["lm loss"] == pytest.approx(b["lm loss"], rel=1e-3)


@pytest.mark.soak
def test_running_text_goes_on_and_keeps_its_upper_bound(tmp_path: Path) -> None:
    """Corpora of which more is read than the blend's shares have room for."""
    names = ("like", "unlike", "target", "general", "held_out")
    data = {name: indexed(tmp_path, 12, name, 200 * n) for n, name in enumerate(names)}
    text = "--tokenizer-type NullTokenizer --vocab-size 1999 --null-tokenizer-eod-id 1998"
    own = f"{text} --seq-length 16 --dr-domain-interval 2 --lr 3e-2"
    found = {}
    for name, also in (("whole", ""), ("first", "--exit-interval 5"), ("rest", "--load {save}")):
        save, path = tmp_path / name.replace("rest", "first"), tmp_path / f"{name}.jsonl"
        argv = f"""{own} --dr-domain-sampling 0.5,2 --dr-metrics {path} --save {save}
            --save-interval 5 {also.format(save=save)}"""
        code, _, error = run(flags(data, more(data, argv), 9))[0]
        assert code == 0, error
        found[name] = trained(path)
    assert found["first"] + found["rest"] == found["whole"] and len(found["whole"]) == 9
    assert len({line[LIKE] for line in found["whole"]}) == 4
    argv = f"{own} --dr-domain-sampling 0.5,3 --load {tmp_path / 'first'} --ckpt-step 5"
    code, _, error = run(flags(data, more(data, argv), 9))[0]
    assert code == 2 and "had an upper bound of 2 in --dr-domain-sampling, and this one" in error
