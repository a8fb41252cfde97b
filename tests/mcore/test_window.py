"""Windows of sample rows in which there is nothing to choose: another one, or a refusal."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dr import DRConfig
from megatron_dr.mcore import compat
from megatron_dr.mcore.layer_rows import window
from megatron_dr.mcore.layer_rows.taps import experts
from megatron_dr.report import metrics

from ._train import data, flags, run

__all__ = ["data"]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a configuration of sample rows the window that it has with so many samples."""
    monkeypatch.setattr(experts, "are_near", lambda: True)

    def settled(micro: int, step: int, **dials: Any) -> tuple[str, str]:
        monkeypatch.setattr(compat, "samples_of_a_step", lambda: (micro, step))
        dr, why = window.settled(DRConfig(rows="sample", **dials))
        return dr.window, why

    return settled


TOPK = {"set": "topk", "fraction": 0.25}
CHOSEN = [
    (1, 8, TOPK, "step"),
    (3, 8, TOPK, "step"),
    (4, 8, TOPK, "microbatch"),
    (1, 8, {"set": "cone"}, "step"),
    (2, 8, {"set": "cone"}, "microbatch"),
    (1, 1, {"set": "cone"}, "microbatch"),
    (1, 8, {"set": "mean"}, "microbatch"),
    (1, 8, {"set": "cone", "score": "ghost"}, "microbatch"),  # keeps no samples to a step's end
    (1, 8, {"set": "filter", "fraction": 1.0, "score": "ghost", "norm": "tokens"}, "step"),
    (8, 8, {"alpha_style": "auto", "passes": 2}, "step"),
]


@pytest.mark.parametrize("micro, step, dials, expected", CHOSEN)
def test_auto_has_something_to_choose(
    sizes: Any, micro: int, step: int, dials: dict[str, Any], expected: str
) -> None:
    found, why = sizes(micro, step, **dials)
    assert found == expected
    said = expected == "step" and "alpha_style" not in dials
    assert (f"the {step} samples of a step compete; with --micro-batch-size {micro}" in why) == said


REFUSED = [
    (1, 8, TOPK | {"window": "microbatch"}, "raise --micro-batch-size, or use --dr-window step."),
    (2, 8, TOPK | {"window": "microbatch"}, "2 compete (--micro-batch-size 2)"),
    (1, 8, TOPK | {"window": "streaming", "blocks": "matrix"}, "1 competes (--micro-batch-size 1)"),
    (1, 2, TOPK | {"window": "step"}, "2 compete (--global-batch-size 2), so that its choice"),
    (1, 2, TOPK, "2 compete (--global-batch-size 2)"),
    (1, 1, TOPK, "1 competes (--micro-batch-size 1)"),
    (1, 1, {"set": "hull", "window": "step"}, "--dr-set hull chooses among 2 samples or more"),
    (1, 8, {"set": "filter", "window": "microbatch"}, "filter with --dr-fraction 0.25 chooses"),
    (1, 8, {"set": "greedy", "score": "ghost"}, "or use --dr-window step."),
]


@pytest.mark.parametrize("micro, step, dials, sentence", REFUSED)
def test_a_window_without_a_choice_is_refused(
    sizes: Any, micro: int, step: int, dials: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sizes(micro, step, **dials)


def test_windows_whose_size_is_not_known_before() -> None:
    """In a loop of one's own: said in the first step; of packs nothing is known."""
    topk = DRConfig(rows="sample", **TOPK, window="microbatch")
    assert window.settled(topk) == (topk, "")
    assert "chooses among 4 samples or more, and a microbatch has 1" in window.note(topk, 1)
    cone = DRConfig(rows="sample", set="cone", window="microbatch")
    assert "one sample in a microbatch: cone keeps its direction where" in window.note(cone, 1)
    assert window.note(cone, 2) == "" == window.note(topk, 4)


def test_one_sample_a_microbatch_in_a_run(data: dict[str, str], tmp_path: Path) -> None:
    """By default half of the step's samples are kept, and it is said; by name it is refused."""
    path = tmp_path / "m.jsonl"
    more = f"""--dr-target-data {data["target"]} --dr-target-batch-size 4 --dr-rows sample
        --dr-set topk --dr-fraction 0.5 --dr-norm tokens --dr-blocks matrix --eval-iters 0
        --dr-metrics {path}"""
    code, out, error = run(flags(data, more, 2))[0]
    assert code == 0, error
    assert "window auto: the 8 samples of a step compete; with --micro-batch-size 1" in out
    assert "sample rows of a step" in out
    for line in metrics.read(path, "train"):
        assert line["dr zero rows"] == 4
    (code, _, error), (other, *_) = run(flags(data, f"{more} --dr-window microbatch", 2))
    assert code == other == 2
    assert "--dr-window microbatch 1 competes (--micro-batch-size 1)" in error
