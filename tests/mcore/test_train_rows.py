"""The training entry with each kind of rows, alpha by agreement, MeSO: log, resume, refusals."""

import re
from pathlib import Path

import pytest

from megatron_dr.report import metrics

from ._pairs import some
from ._train import cone, data, flags, losses, run, two_corpora

__all__ = ["data"]


def test_domain_rows_are_weighed_and_logged_by_name(data: dict[str, str], tmp_path: Path) -> None:
    metrics_path = tmp_path / "m.jsonl"
    more = f"""{two_corpora(data, tmp_path)} --dr-target-data {data["target"]}
        --dr-target-batch-size 4 --dr-rows domain --dr-blocks layer --dr-log-blocks
        --dr-metrics {metrics_path}"""
    (_, said, _), (code, out, error) = run(flags(data, more))
    assert code == 0, error
    assert "2 rows a step (domain)" in said
    assert re.search(r"iteration +6/.*dr weight english: .*dr weight german: ", out)
    assert re.search(r"iteration 6 \| decoder.layers.1 \| dr cos general: ", out)
    for line in metrics.read(metrics_path, "train"):
        assert line["dr weight english"] >= 0 and line["dr weight german"] >= 0


def test_target_ranks_train_and_report_both_roles(data: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-rows rank
        --dr-target-ranks 1 --dr-target-valid-data {data["held_out"]} --dr-metrics {path}"""
    results = run(flags(data, more))
    assert [code for code, _, _ in results] == [0, 0], results[0][2]
    assert "exact gram (auto: less time exposed): a rank sends after the backward" in results[0][1]
    trained = metrics.read(path, "train")
    assert len(trained) == 6
    for line in trained:
        assert 0 < line["lm loss"] < 7 and 0 < line["target loss"] < 7
    assert trained[-1]["target loss"] < trained[0]["target loss"]


def test_alpha_chosen_by_agreement_survives_a_resume(data: dict[str, str], tmp_path: Path) -> None:
    auto = cone(data) + " --dr-alpha-style auto"
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    code, _, error = run(flags(data, f"{auto} --dr-metrics {whole}"))[0]
    assert code == 0, error
    saved = f"{auto} --dr-metrics {parts} --save {tmp_path / 'save'} --save-interval 3"
    assert run(flags(data, saved + " --exit-interval 3"))[0][0] == 0
    code, said, error = run(flags(data, f"{saved} --load {tmp_path / 'save'}"))[0]
    assert code == 0, error
    one, other = metrics.read(whole, "train"), metrics.read(parts, "train")
    assert len(one) == len(other) == 6
    for a, b in zip(one, other, strict=True):
        for name in ("dr alpha", "dr beta", "dr r", "dr D", "dr G", "dr m", "dr E", "dr wear"):
            assert a[name] == b[name], name  # bit for bit
        assert a["lm loss"] == b["lm loss"]
    assert len({a["dr D"] for a in one}) == len({a["dr m"] for a in one}) == 6
    assert "different target samples (n)" in said and "counted by its learning rate" in said


@pytest.mark.parametrize(
    "more, world, why",
    [
        ("--dr-rows rank --dr-target-ranks 1", 2, "an odd number of row groups runs the target"),
        ("--dr-slots 4 --dr-target-batch-size 1", 1, "a rank has 1 target microbatch(es)"),
        ("--dr-rows rank", 1, "a step has one row"),
    ],
)
def test_where_auto_cannot_choose_alpha_is_the_safest_constant(
    data: dict[str, str], tmp_path: Path, more: str, world: int, why: str
) -> None:
    path = tmp_path / "m.jsonl"
    target = f"--dr-target-data {data['target']} --dr-target-batch-size 4"
    argv = f"{target} {more} --dr-alpha-style auto --dr-metrics {path} --lr-decay-style linear"
    code, said, error = run(flags(data, argv), world)[0]
    assert code == 0, error
    lines = metrics.read(path, "train")
    assert said.count(f"--dr-alpha-style auto can't choose, as {why}") == 1
    passes = (1 if "size 1" in more else 4) / 6 * sum(1 - step / 6 for step in range(6))
    assert [line["dr E"] for line in lines] == [pytest.approx(passes)] * 6
    assert [line["dr alpha"] for line in lines] == [pytest.approx(min(0.5, 1.5 / passes))] * 6
    assert all("dr r" not in line for line in lines)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--dr-rows domain", "--dr-rows domain needs at least two corpora"),
        ("--dr-rows rank --dr-target-ranks 2", "--dr-target-ranks 2 must be a multiple of 1"),
        ("--dr-slots 2 --dr-target-ranks 1", "target_ranks needs rows='rank'"),
        ("--dr-rows rank --dr-row-ranks 3", "--dr-row-ranks 3 must be a multiple of 1"),
    ],
)
def test_rows_that_cannot_be_are_refused(data: dict[str, str], more: str, message: str) -> None:
    target = f"--dr-target-data {data['target']} --dr-target-batch-size 4 "
    results = run(flags(data, target + more))
    assert [code for code, _, _ in results] == [2, 2]
    assert message in results[0][2]


SAMPLE_ROWS = {
    "matrix": "--dr-set topk --dr-fraction 0.5 --dr-norm tokens --dr-blocks matrix",
    "two passes": "--dr-blocks model --dr-passes 2 --dr-score sketched --dr-window step",
    "refreshed": "--dr-set filter --dr-fraction 1 --dr-norm tokens --dr-blocks matrix --dr-alpha 0 "
    "--dr-target-refresh 3",
    "streaming": "--dr-set topk --dr-fraction 0.5 --dr-norm tokens --dr-blocks matrix "
    "--dr-window streaming",
}


def samples(data: dict[str, str], mode: str) -> str:
    return f"""--dr-rows sample --dr-target-data {data["target"]} --dr-target-batch-size 4
        --micro-batch-size 2 {SAMPLE_ROWS[mode]}"""


@pytest.mark.parametrize("mode", some({name: name for name in SAMPLE_ROWS}, "refreshed"))
def test_sample_rows_resume_where_they_stopped(
    data: dict[str, str], tmp_path: Path, mode: str
) -> None:
    """Also between two target passes: then the target of the last one is still used."""
    paths = [tmp_path / name for name in ("whole.jsonl", "first.jsonl", "second.jsonl")]
    checkpoint = f"--save {tmp_path / 'saved'} --save-interval 2"
    more = [
        ("", 4, paths[0]),
        (f"{checkpoint} --exit-interval 2", 4, paths[1]),
        (f"{checkpoint} --load {tmp_path / 'saved'}", 4, paths[2]),
    ]
    for extra, steps, path in more:
        found = run(flags(data, f"{samples(data, mode)} {extra} --dr-metrics {path}", steps))
        assert [code for code, _, _ in found] == [0, 0], found[0][2]
    for name in ("lm loss", "target loss"):
        whole, *parts = [
            {line["iteration"]: line[name] for line in metrics.read(path, "train") if name in line}
            for path in paths
        ]
        assert len(whole) == 4 or (list(whole) == [1, 4] and mode == "refreshed")
        assert parts[0] | parts[1] == pytest.approx(whole, abs=1e-5)


def test_sample_rows_with_the_target_in_the_microbatches(
    data: dict[str, str], tmp_path: Path
) -> None:
    """Tensor-parallel ranks get batches of general and target samples from the one that reads."""
    path = tmp_path / "metrics.jsonl"
    more = f"""{samples(data, "matrix")} --dr-target-pass merged --tensor-model-parallel-size 2
        --sequence-parallel --dr-metrics {path}"""
    code, out, _ = run(flags(data, more, 3))[1]
    assert code == 0 and "dr zero rows: " in out
    first, *_, last = metrics.read(path, "train")
    assert last["lm loss"] < first["lm loss"]
    code, _, error = run(flags(data, more.replace("batch-size 4", "batch-size 6"), 3))[0]
    assert code != 0 and "not a multiple of the 4 general microbatches" in error


@pytest.mark.soak
def test_meso_trains_and_resumes(data: dict[str, str], tmp_path: Path) -> None:
    """The optimizer's moments in a compressed space, beside the plugin's cone."""
    paths = [tmp_path / name for name in ("whole.jsonl", "first.jsonl", "second.jsonl")]
    checkpoint = f"--save {tmp_path / 'saved'} --save-interval 2"
    more = [("", paths[0]), (f"{checkpoint} --exit-interval 2", paths[1]),
            (f"{checkpoint} --load {tmp_path / 'saved'}", paths[2])]  # fmt: skip
    for extra, path in more:
        meso = "--dr-meso-size 8 --dr-meso-refresh 3"  # stopped before the next subspace
        argv = flags(data, f"{cone(data)} {meso} {extra} --dr-metrics {path}", 4)
        argv.remove("--use-distributed-optimizer")
        found = run(argv)
        assert [code for code, _, _ in found] == [0, 0], found[0][2]
        assert "MeSO" in found[0][1]
    whole, *parts = [losses(path, "train") for path in paths]
    assert parts[0] | parts[1] == {step: pytest.approx(v, abs=1e-6) for step, v in whole.items()}


def test_meso_refuses_the_distributed_optimizer(data: dict[str, str]) -> None:
    found = run(flags(data, "--dr-meso-size 8"))
    assert all(code != 0 for code, _, _ in found)
    assert "--use-distributed-optimizer" in found[0][2]


NAMES = ("cos general", "cos update", "residual", "rows", "zero rows", "bytes", "alpha",
         "sketch ms", "exchange ms", "solve ms", "combine ms")  # fmt: skip


@pytest.mark.parametrize("blocks", ["matrix", "model"])
def test_sample_rows_log_what_other_rows_do(
    data: dict[str, str], tmp_path: Path, blocks: str
) -> None:
    """Weights found in the backward, and at the step's end; each block too."""
    path = tmp_path / "m.jsonl"
    more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-rows sample
        --dr-blocks {blocks} --dr-alpha-style linear --dr-log-blocks --dr-metrics {path}"""
    code, out, error = run(flags(data, more))[1]
    assert code == 0, error
    lines = metrics.read(path, "train")
    assert len(lines) == 6
    for line in lines:
        assert {f"dr {name}" for name in NAMES} <= line.keys()
        assert -1 <= line["dr cos update"] <= 1 and line["dr bytes"] > 0 and line["dr solve ms"] > 0
    block = "decoder.layers.1.mlp.linear_fc2.weight" if blocks == "matrix" else "model"
    assert re.search(rf"iteration 6 \| {block} \| dr cos general: ", out)


@pytest.mark.parametrize("rows", ["--dr-slots 2", "--dr-rows sample"], ids=("slot", "sample"))
def test_blocks_on_tensorboard(data: dict[str, str], tmp_path: Path, rows: str) -> None:
    """Every second step, as Megatron's own: what the log shows, and of one block the model's.

    Blocks of layers lie on both stages of a pipeline; the last rank writes all of them.
    """
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = {}
    for blocks in ("layer", "model"):
        folder = tmp_path / blocks
        more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 {rows}
            --dr-blocks {blocks} --dr-log-blocks --pipeline-model-parallel-size 2 --eval-iters 0
            --tensorboard-dir {folder} --tensorboard-log-interval 2 --dr-metrics {folder}.jsonl"""
        code, out, error = run(flags(data, more, 4))[1]
        assert code == 0, error
        board = events.EventAccumulator(str(folder)).Reload()
        scalars = {tag: {e.step: e.value for e in board.Scalars(tag)}
                   for tag in board.Tags()["scalars"]}  # fmt: skip
        shown[blocks] = {tag: v for tag, v in scalars.items() if tag.count("/") and tag[:2] == "dr"}
        lines = re.findall(r"^ iteration (\d) \| (\S+) \| (dr .*)$", out, re.M)
        logged = {
            (f"{name}/{block}", int(step)): float(value)
            for step, block, values in lines
            for name, value in re.findall(r"(dr [a-z ]+): +(\S+)", values)
        }
        assert {step for _, step in logged} == {1, 2, 3, 4}
        assert {tag for tag, _ in logged} == shown[blocks].keys()
        for tag, values in shown[blocks].items():
            assert values == {step: pytest.approx(logged[tag, step], abs=6e-4) for step in (2, 4)}
    of_layers = {tag.partition("/")[2] for tag in shown["layer"]}
    assert {f"decoder.layers.{n}" for n in range(2)} <= of_layers
    whole = {m["iteration"]: m for m in metrics.read(tmp_path / "model.jsonl", "train")}
    for tag, values in shown["model"].items():
        name, _, block = tag.partition("/")
        assert block == "model"
        for step, value in values.items():
            assert value == pytest.approx(whole[step][name], rel=1e-5)
