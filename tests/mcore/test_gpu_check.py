"""What `megatron-dr gpu-check` runs, on the CPU at small sizes; and that it would see an error."""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from megatron_dr.cli import gpu_check
from megatron_dr.config.dr import DRConfig
from megatron_dr.mcore.buffer_rows import rows as buffer_rows
from megatron_dr.mcore.gpu_check import cost, maths, oracle, paths, trace, waits
from megatron_dr.mcore.gpu_check.found import Found
from megatron_dr.mcore.gpu_check.model import SMALL, Model
from megatron_dr.mcore.gpu_check.start import start
from megatron_dr.mcore.layer_rows import immediate
from megatron_dr.projection import solve_qp

from ._ranks import run_ranks

CPU = torch.device("cpu")
NO_CUDA = "skipped: no CUDA device"


def check(out: Path, parts: str) -> int:
    with open(out / "table.txt", "w") as sys.stdout:
        return gpu_check.main(["--out", str(out), "--parts", parts])


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is slow."""
    parts = {name: part._replace(seconds=280.0) for name, part in gpu_check.PARTS.items()}
    monkeypatch.setattr(gpu_check, "SECONDS", 280.0)
    monkeypatch.setattr(gpu_check, "PARTS", parts)


def fewer(table: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: table[name] for name in names}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_the_cpu_runs_what_it_can(
    whole: bool, patient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part but the doctor's, which has tests of its own; at first with fewer cases."""
    if not whole:
        some = ("topk, sketched", "cone of the model, 2 passes")
        monkeypatch.setattr(paths, "SAMPLES", fewer(paths.SAMPLES, *some))
        arms = ("plain Megatron", "plain, as many microbatches", *trace._ARMS[1:3])
        monkeypatch.setattr(cost, "ARMS", fewer(cost.ARMS, *arms))
        monkeypatch.setattr(trace, "_ARMS", trace._ARMS[1:2])
    parts = ",".join(name for name in gpu_check.PARTS if name != "doctor")
    (code,) = run_ranks(1, check, tmp_path, parts, timeout=280)
    assert code == 0, (tmp_path / "report.txt").read_text()
    report = json.loads((tmp_path / "report.json").read_text())["parts"]
    _compared(report)
    _measured(report, tmp_path)


def _compared(parts: dict[str, Any]) -> None:
    states = {name: part["state"] for name, part in parts.items()}
    skipped = dict.fromkeys(("maths", "waits"), NO_CUDA)
    assert states == {**dict.fromkeys(states, "ok"), **skipped}
    for name, cases in (("buffers", paths.BUFFERS), ("layers", paths.SAMPLES)):
        found = {line["name"]: line for line in parts[name]["found"]}
        for case in cases:
            for kind in ("local fp32", "local bf16"):
                assert found[f"{kind}: {case}"]["state"] == "ok"
            assert found[f"te bf16: {case}"]["state"] == NO_CUDA
    assert all(line["state"] == NO_CUDA for line in parts["waits"]["found"])
    strict = [line for line in parts["repeat"]["found"] if line["name"].startswith("determ")]
    assert len(strict) == 1 + len(paths.BUFFERS) + len(paths.SAMPLES)
    assert {line["state"] for line in strict[1:]} == {"ok"}


def _measured(parts: dict[str, Any], out: Path) -> None:
    found = {line["name"]: line["figures"] for line in parts["step"]["found"]}
    assert found["plain Megatron"]["/ plain"] == 1.0
    for name, figures in found.items():
        if name != "model":
            assert figures["step ms"] > 0 and figures["/ plain"] > 0 and "peak GiB" not in figures
    assert found["cone, 4 slots, sketch"]["sketch / copy"] > 0
    assert found["cone, 4 slots, exact"]["combine ms"] > 0
    names = [line["name"] for line in parts["parts"]["found"]]
    for part in ("gram", "sketch", "weighted sum", "solve"):
        assert any(name.startswith(part) for name in names)
    for line in parts["trace"]["found"]:
        assert (out / line["figures"]["file"]).stat().st_size > 1000


# -- it sees errors --------------------------------------------------------------------------------
def compared(rows: str, case: str) -> Found:
    """On a rank: a case of fp32 local layers."""
    start(CPU)
    model = Model(SMALL, CPU, "local", "fp32")
    dr, expect = (
        (paths.BUFFERS[case], paths.of_slots)
        if rows == "buffers"
        else (paths.SAMPLES[case], paths.of_samples)
    )
    return paths._compare(case, model, dr, paths.LIMITS["fp32"], expect)


@pytest.mark.parametrize(
    ("rows", "case", "module"),
    [("buffers", "exact gram", buffer_rows), ("layers", "cone, ghost", immediate)],
)
def test_a_wrong_step_fails(
    rows: str, case: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An alpha that is off by 0.002."""
    stock = module.project

    def wrong(gram: Any, set_: Any, norm: str, alpha: Any, *rest: Any) -> Any:
        return stock(gram, set_, norm, alpha + 0.002, *rest)

    monkeypatch.setattr(module, "project", wrong)
    (found,) = run_ranks(1, compared, rows, case)
    assert found.state == "FAILED" and 1e-4 < found.figures["error"] < 0.1


def test_maths_against_itself() -> None:
    found = list(maths.compare(CPU, small=True))
    assert {line.state for line in found} == {"ok"}
    assert len({line.name for line in found}) == len(found) > 40


def test_wrong_maths_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of two, which stands for the device's, is off by 1e-4."""
    calls = []

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return solve_qp(*args, **kwargs) * (1.0 + 1e-4 * (len(calls) % 2 == 0))

    monkeypatch.setattr(maths, "solve_qp", wrong)
    states = [line.state for line in maths.solvers(maths.grams(3, 4), CPU)]
    assert states[::2] == 3 * ["FAILED"]
    assert np.isnan(maths.apart(torch.tensor([float("nan")]), torch.ones(1)))


def test_the_oracles_cone() -> None:
    """Every support against active sets, rows of zeros and twins among them."""
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 2, 5):
        j_MN = torch.randn(rows, 9, generator=generator).double()
        j_MN[-1] = 0.0 if rows == 2 else j_MN[0]
        t = torch.randn(9, generator=generator).double()
        dr, ridge = DRConfig(ridge=0.3), 0.3 * j_MN.square().sum() / rows
        found, near = oracle.weights(dr, j_MN @ j_MN.T, j_MN @ t)
        root = ridge.sqrt()
        a = torch.cat([j_MN.T, root * torch.eye(rows).double()])
        b = torch.cat([t, torch.full((rows,), float(root) / rows).double()])
        assert not near and torch.from_numpy(nnls(a.numpy(), b.numpy())[0]).allclose(found)


def test_the_oracles_choice() -> None:
    dr = DRConfig(set="topk", fraction=0.5, rows="sample", blocks="matrix")
    gram = torch.eye(4).double()
    assert oracle.weights(dr, gram, torch.tensor([1.0, 3, 2, 0]).double())[0].tolist() == [
        0, 0.5, 0.5, 0,
    ]  # fmt: skip
    assert oracle.weights(dr, gram, torch.tensor([1.95, 3, 2, 0]).double())[1]
    with pytest.raises(ValueError, match="not 'hull'"):
        oracle.weights(DRConfig(set="hull"), gram, torch.ones(4).double())


# -- waits -----------------------------------------------------------------------------------------
def waited() -> list[Found]:
    """On a rank, where a mode of torch's is a stand-in: without, then with a function of the
    plugin's that waits."""
    start(CPU)
    mode: list[str] = []
    torch.cuda.set_sync_debug_mode = mode.append  # type: ignore[assignment]

    def wait() -> None:
        if mode and mode[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    def waiting(*args: Any) -> Any:
        wait()
        return stock(*args)

    stock, found = buffer_rows.normalisation.factors, []
    model = Model(SMALL, CPU, "local", "bf16")
    dr = paths.BUFFERS["exact gram"]
    for module in (buffer_rows.normalisation, SimpleNamespace(factors=waiting)):
        buffer_rows.normalisation = module  # type: ignore[assignment]
        found.append(waits._verdict("exact gram", waits.count(model, dr)))
        assert mode.count("warn") == len(found) and mode[-1] == "default"
    return found


def test_a_wait_is_counted_and_placed() -> None:
    ((without, with_ours),) = run_ranks(1, waited)
    assert without.state == "ok" and without.figures["of these in megatron_dr"] == 0
    assert with_ours.state == "FAILED" and with_ours.figures["of these in megatron_dr"] == 1
    assert with_ours.said.startswith("megatron_dr/mcore/buffer_rows/rows.py:")
