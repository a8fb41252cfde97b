"""The commands of docs/quickstart.md, as they stand, on a tiny random checkpoint."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dr.report import metrics

from ._clean import ROOT
from ._converted import make

TEXT = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")


def blocks() -> list[str]:
    """Shell commands in the order of the text; a Python block as a command."""
    found = []
    for kind, body in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S):
        assert kind in ("sh", "python"), kind
        found.append(body if kind == "sh" else f"python - <<'END'\n{body}END\n")
    return found


def shell(command: str, folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        ["bash", "-euc", command], cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{command}\n{out[-9000:]}"
    return out


@pytest.mark.timeout(900)  # seven interpreters start, on whatever is free of the machine
def test_every_command(tmp_path: Path) -> None:
    make("qwen2", tmp_path / "model")
    for path in (ROOT / "examples/sft/tokenizer").iterdir():
        shutil.copy(path, tmp_path / "model")
    for name, count in (("general", 40), ("target", 8)):
        asked = [(f"What is {n}?", f" A {name} number.") for n in range(count)]
        lines = [{"prompt": prompt, "response": response} for prompt, response in asked]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    said = [shell(command, tmp_path) for command in blocks()]
    assert len(said) == 4
    assert "loads both checkpoints" in TEXT and "they agree" in said[2]
    assert "\nWhat is the start of wisdom?" in said[3]
    losses = [line["target loss"] for line in metrics.read(tmp_path / "metrics.jsonl", "train")]
    assert len(losses) == 8 and losses[-1] < losses[0]
