"""`megatron-dr plan`: what it prints, its files and its exit codes."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dr.cli.plan import main

from .test_plan_flags import MODEL, RUN, TARGET

FLAGS = f"{MODEL} {RUN} {TARGET}".split()
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "8", *FLAGS]) == 0
    said = capsys.readouterr().out
    assert "8 GPUs (DP 8): 2 general and 1 target microbatches of 2 x 512 tokens" in said
    for part in ("weights", "activations", "between nodes", "computation", "rows auto: 8 rows"):
        assert part in said


def test_numbers_and_page_of_a_model_of_hugging_face(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not fit on one GPU; the hardware is a file's."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "mine.yaml").write_text("memory: 90e9\nbetween: {bandwidth: 2.0e+10}\n")
    page = tmp_path / "plan.html"
    words = ["--gpus", "1", "--hf-config", str(tmp_path), "--hardware", str(tmp_path / "mine.yaml"),
             "--html", str(page), "--json", *RUN.split()]  # fmt: skip
    assert main(words) == 1
    numbers: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert numbers["memory"]["stages"][0]["weights"] >= 2 * 8_030_261_248
    assert numbers["memory"]["usable"] == 85e9 and numbers["rows"] is None
    assert numbers["refusal"].startswith("It does not fit: a rank needs")
    text = page.read_text()
    assert "<svg" in text and "It does not fit" in text and "stage 0" in text


def test_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "4", "--sweep", "--json", *FLAGS]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["layout"]["dp"] * found[0]["layout"]["tp"] <= 4 and found[0]["seconds"] > 0
    assert main(["--gpus", "4", "--sweep", *FLAGS]) == 0
    assert "layouts fit; the fastest" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--gpus", "0"], "--gpus must be at least 1, not 0."),
        (["--gpus", "8", "--hardware", "h9000"], "--hardware h9000: neither one of h100, h200"),
        (["--gpus", "8", "--hf-config", "/no/where"], "/no/where/config.json: no such file."),
        (["--gpus", "8", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--gpus", "8", "--micro-batch-size", "3"], "Megatron refuses"),
        (["--gpus", "8", "--sample-length", "nan"], "--sample-length must be a number of tokens"),
        (["--gpus", "8", "--sample-length", "inf"], "--sample-length must be a number of tokens"),
        (["--gpus", "8", "--sample-length", "0"], "above 0, not 0."),
        (["--gpus", "8", "--sample-length", "513"], "513 is more than --seq-length 512"),
        (["--gpus", "8", "--sweep", "--html", "a.html"], "--html is a page of one layout"),
        (["--gpus", "8", "--sweep", "--dr-row-ranks", "3"], "rows of 3 ranks must be a multiple"),
    ],
)
def test_bad_input(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if "--hf-config" in words else FLAGS
    assert main([*more, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("plan: error: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("text, says", [("a: [", "not YAML"), ("memroy: 1", "'memroy' is none")])
def test_bad_hardware(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert main(["--gpus", "8", "--hardware", str(path), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert f"{path}: " in said and says in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["dp2, plain", "tp2, 4 slots", "dp2, sketches"])
def test_a_run_that_is_timed_can_be_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`benchmarks/plan_seconds.py`: twice the rate, half the computation, and nothing else."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    timed = importlib.import_module("plan_seconds")
    timed.write(tmp_path)
    found = []
    for rate in (1e10, 2e10):
        timed.write_hardware(tmp_path / "mine.yaml", rate, timed.Machine(1e10, 1e9, 1e-4))
        found.append(timed.planned(timed.CASES[name], tmp_path, tmp_path / "mine.yaml"))
    slow, fast = found
    assert slow.keys() == fast.keys() and slow["computation"] > 0
    assert slow["computation"] == pytest.approx(2 * fast["computation"])
    assert slow["optimizer"] == fast["optimizer"] > 0
