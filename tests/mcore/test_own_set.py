"""A feasible set of one's own: ten lines, trained with through the flags as any other."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_dr.projection import FeasibleSet
from megatron_dr.report import metrics

from ._train import data, flags, run, two_corpora

__all__ = ["data"]  # a fixture


@dataclass(frozen=True)
class Leader(FeasibleSet):
    """The row that agrees most with the target has the weight `fraction`; the others share."""

    fraction: float
    dials = ("fraction",)

    def weights(self, gram_BMM: Tensor, cross_BM: Tensor) -> Tensor:
        rest = (1.0 - self.fraction) / (cross_BM.shape[1] - 1)
        first_B1 = cross_BM.argmax(1, keepdim=True)
        return torch.full_like(cross_BM, rest).scatter_(1, first_B1, self.fraction).double()


class Idle(FeasibleSet):
    """Lacks weights."""


class Unknown(Leader):
    dials = ("fraction", "temperature")  # type: ignore[assignment]


MODULE = __name__


def test_trains_with_it(data: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    own = f"--dr-set {MODULE}:Leader --dr-fraction 0.75 --dr-rows domain"
    more = f"{two_corpora(data, tmp_path)} --dr-target-data {data['target']} {own}"
    code, out, error = run(flags(data, f"{more} --dr-metrics {path}", 3))[0]
    assert code == 0, error
    assert f"set {MODULE}:Leader, 2 rows a step (domain)" in out
    for line in metrics.read(path, "train"):
        weights = sorted(line[f"dr weight {corpus}"] for corpus in ("english", "german"))
        assert weights == pytest.approx([0.25, 0.75])
    error = run(flags(data, f"{more} --dr-ridge 1"))[0][2]
    assert f"--dr-ridge has no meaning with --dr-set {MODULE}:Leader: drop one of them." in error


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("tests.mcore.none:Leader", "can't be loaded: No module named 'tests.mcore.none'."),
        (f"{MODULE}:Follower", "can't be loaded: "),
        (f"{MODULE}:Idle", "is no feasible set: derive the class from"),
        (f"{MODULE}:run", "is no feasible set: derive the class from"),
        (f"{MODULE}:Unknown", "has dials without a flag: temperature."),
        ("sphere", "must be one of mean, target, topk,"),
    ],
)
def test_a_wrong_name_is_refused(data: dict[str, str], name: str, sentence: str) -> None:
    code, out, error = run(flags(data, f"--dr-target-data {data['target']} --dr-set {name}"), 1)[0]
    said = [line for line in error.splitlines() if line.startswith("megatron_dr: error: ")]
    assert code == 2 and len(said) == 1 and sentence in said[0], error[-2000:]
    assert "iteration        1/" not in out
