"""`--dr-generate`: answers at a run's end and their scores, the same in every layout."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.loop import generation
from megatron_dr.report import metrics
from megatron_dr.rl.rollouts import Completion

from ._train import flags, run

STEPS = 40  # in which it learns to say one thing to all prompts
FEW = "--micro-batch-size 4 --eval-interval 100"  # passes of the model
MORE = "--dr-generate-metrics exact,f1,tests.mcore._rewards:wants --dr-generate-tokens 8"
Line = dict[str, Any]


def write(path: Path, lines: list[Line]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All samples have the same answer. Of the five that are asked about two have it, one a word of
    it, and for one there is no reward."""
    folder = tmp_path_factory.mktemp("generation")
    same = [{"prompt": f"Q{n}:", "response": "oui oui"} for n in range(24)]
    wanted = ["Oui, oui!", "oui oui", "oui", "non", "rien"]
    asked = [{"prompt": f"Q{n}:", "response": text} for n, text in enumerate(wanted)]
    asked[4]["answer"] = {"none": True}
    found = {"general": same, "held_out": same[:8], "asked": asked}
    return {name: write(folder / f"{name}.jsonl", lines) for name, lines in found.items()}


@pytest.fixture(scope="module")
def trained(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank trains, saves and answers: its folder, its line of metrics, answers and log."""
    folder = tmp_path_factory.mktemp("trained")
    more = f"""{FEW} --dr-generate {data["asked"]} {MORE} --save {folder} --save-interval 100
        --dr-metrics {folder}/m.jsonl --tensorboard-dir {folder}/board"""
    code, out, error = run(flags(data, more, STEPS), 1)[0]
    assert code == 0, error
    return {"folder": folder, "out": out, **left(folder / "m.jsonl")}


def left(path: Path) -> dict[str, Any]:
    """What a run with these metrics wrote: the line, and the answers."""
    (line,) = metrics.read(path, "generation")
    text = path.with_suffix(".generated.jsonl").read_text()
    return {"line": line, "answers": [json.loads(one) for one in text.splitlines()]}


def test_answers_are_scored_and_kept(trained: dict[str, Any], data: dict[str, str]) -> None:
    reward = "tests.mcore._rewards:wants"
    answers = trained["answers"]
    assert [one["answer"].strip() for one in answers] == ["oui oui"] * 5, answers
    assert [one["scores"]["exact"] for one in answers] == [1, 1, 0, 0, 0]
    assert [one["scores"]["f1"] for one in answers] == pytest.approx([1, 1, 2 / 3, 0, 0])
    assert [one["scores"][reward] for one in answers] == [9, 7, 3, 3, None]
    assert answers[2]["reference"] == "oui" and answers[2]["prompt"] == "Q2:"
    assert answers[2]["origin"] == f"{data['asked']}:3"
    assert not any(one["truncated"] for one in answers)
    line = trained["line"]
    assert line["kind"] == "generation" and line["iteration"] == STEPS and line["truncated"] == 0
    assert line["exact"] == 0.4 and line["f1"] == pytest.approx((2 + 2 / 3) / 5)
    assert line[reward] == 22 / 4 and line[f"failed {reward}"] == 1  # of those that it scored
    out = trained["out"]
    said = f" generation at iteration {STEPS} | exact: 4.000000E-01 | f1: 5.333333E-01 | "
    assert 0 < out.rindex("validation loss at iteration") < out.index(said), "it comes last"


def test_tensorboard_has_them(trained: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(trained["folder"] / "board"))
    board.Reload()
    (event,) = board.Scalars("exact generation")
    assert event.step == STEPS and event.value == pytest.approx(0.4)


LAYOUTS = {
    "dp2": (2, ""),
    "tp2": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize(
    "name", ["tp2", *(pytest.param(n, marks=pytest.mark.soak) for n in ("dp2", "pp2"))]
)
def test_every_layout_has_the_same(
    name: str, trained: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    """Without training, from what the run saved."""
    world, layout = LAYOUTS[name]
    more = f"""--skip-train --load {trained["folder"]} {layout} --dr-generate {data["asked"]} {MORE}
        --dr-metrics {tmp_path}/m.jsonl"""
    for code, _, error in run(flags(data, more, STEPS), world):
        assert code == 0, error
    assert left(tmp_path / "m.jsonl") == {name: trained[name] for name in ("line", "answers")}


@pytest.mark.soak
def test_two_ranks_train_and_answer(data: dict[str, str], tmp_path: Path) -> None:
    """Without held-out data, into --save. A run that is stopped before its end answers nothing."""
    common = f"{FEW} --dr-generate {data['asked']} --save-interval 100 --save"
    argv = flags(data, f"{common} {tmp_path}/a", STEPS)
    at = argv.index("--valid-data-path")
    del argv[at : at + 2]
    for code, _, error in run(argv):
        assert code == 0, error
    text = (tmp_path / "a" / "generated.jsonl").read_text()
    scores = [json.loads(line)["scores"] for line in text.splitlines()]
    assert [one["exact"] for one in scores] == [1, 1, 0, 0, 0]
    assert run(flags(data, f"{common} {tmp_path}/b --exit-interval 2"))[0][0] == 0
    assert not (tmp_path / "b" / "generated.jsonl").exists()


def test_what_asks_for_no_answer_ends_the_start(data: dict[str, str], tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": "no prompt"}])
    more = f"--dr-generate {texts} --dr-metrics {tmp_path}/m.jsonl"
    code, out, error = run(flags(data, more), 1)[0]
    assert code == 2 and f"{texts}:1: a sample whose answer is generated must have" in error
    assert " iteration " not in out


@pytest.mark.soak
def test_a_reward_that_is_not_there_ends_the_start(data: dict[str, str], tmp_path: Path) -> None:
    more = f"""--dr-generate {data["asked"]} --dr-generate-metrics nowhere:here
        --dr-metrics {tmp_path}/m.jsonl"""
    code, out, error = run(flags(data, more))[0]
    assert code == 2 and "nowhere:here" in error and " iteration " not in out


ARGS = {
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "dr_metrics": "m",
    "save": None,
}


@pytest.mark.parametrize(
    "args, own, sentence",
    [
        ({"context_parallel_size": 2}, {}, "--dr-generate does not go with --context-parallel-size "
         "2: set --context-parallel-size 1."),
        ({"expert_model_parallel_size": 2}, {}, "set --expert-model-parallel-size 1."),
        ({"dr_metrics": None}, {}, "--dr-generate needs a place for its answers: give --dr-m"),
        ({}, {"generate_metrics": "bleu"}, "--dr-generate-metrics bleu: no such metric"),
    ],
)  # fmt: skip
def test_refused(args: dict[str, Any], own: dict[str, Any], sentence: str) -> None:
    generation.check(Namespace(**ARGS), TargetConfig(generate="a.jsonl"))
    generation.check(Namespace(**{**ARGS, **args}), TargetConfig())  # off
    with pytest.raises(ValueError, match=sentence):
        generation.check(Namespace(**{**ARGS, **args}), TargetConfig(generate="a.jsonl", **own))


def test_an_answer_of_no_tokens_is_no_text() -> None:
    """Whatever a tokenizer makes of an empty list."""
    at_once, cut = Completion((0,), (-1.0,), "stop"), Completion((7, 0), (-1.0, -1.0), "length")
    own = Namespace(tokenizer=Namespace(detokenize=lambda ids: f"{ids[0]}, {len(ids)} in all"))
    assert generation.Generation._text(own, at_once) == ""
    assert generation.Generation._text(own, cut) == "7, 2 in all"


def test_of_no_score_there_is_no_mean() -> None:
    found = generation._means({"a": [None, 1.0, 0.0], "b": [None, None, None]})
    assert found["a"] == 0.5 and found["failed a"] == 1 and found["failed b"] == 3
    assert found["b"] != found["b"]  # NaN
