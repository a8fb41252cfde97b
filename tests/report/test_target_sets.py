"""A run of several target sets, on its page and in the terminal."""

from pathlib import Path

from megatron_dr.cli import watch
from megatron_dr.report import panels, run_log, tables
from megatron_dr.report.metrics import MetricsFile


def test_each_set_has_a_curve_and_its_best(tmp_path: Path) -> None:
    file = MetricsFile(str(tmp_path / "metrics.jsonl"))
    for step, law in ((1, 3.0), (2, 1.0), (3, 2.0)):
        values = {"lm loss": 4.0, "target loss law": law, "target loss med-2": 5.0,
                  "target loss": 3.0}  # fmt: skip
        file.write("train", step, values)
        file.write("validation", step, values)
    run = run_log.read(tmp_path)
    labels = {panel.title: panel.labels for panel in panels.panels([run])}
    assert labels == {
        "Loss in training": ["lm loss", "target loss"],
        "Held-out loss": ["lm loss", "target loss"],
        "Target loss in training, by set": ["law", "med-2"],
        "Held-out target loss, by set": ["law", "med-2"],
    }
    rows = {row[0]: row[1:] for row in tables.losses([run]).rows}
    assert rows["target loss law, in training"] == ["3", "2", "1", "2"]  # the best is the least
    assert rows["target loss law, held out"] == ["3", "2", "1", "2"]
    said = watch.line_of(
        {"kind": "train", "iteration": 2, "target loss law": 1.0, "dr D": 1.0}, run
    )
    assert said == "step 2 | target loss law 1"
