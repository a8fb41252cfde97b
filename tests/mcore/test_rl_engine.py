"""Training by rewards on completions of another engine: a server that is asked over HTTP."""

from pathlib import Path

import pytest
import torch

from megatron_dr.mcore.rollouts.engine import EngineRollouts
from megatron_dr.report import metrics
from megatron_dr.rl.rollouts import Completion, SamplingParams

from . import _rl
from ._ranks import run_ranks
from ._rl import SAME, data, from_base, regularised

__all__ = ["data"]


@pytest.mark.soak
def test_a_server_answers_for_any_layout(data: dict[str, str], tmp_path: Path) -> None:
    """Alone and on two ranks with tensor parallelism: the same rollouts, the same training."""
    found = []
    for world, layout in ((1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel")):
        path = tmp_path / f"{world}.jsonl"
        more = f"""{regularised(data)} {from_base(data)} {layout} --dr-metrics {path}
            --dr-rl-engine tests.mcore._engines:serve"""
        found.append((_rl.parameters(_rl.run(data, more, 5, world)), metrics.read(path, "train")))
    (one, lines), (two, others) = found
    assert len({line["reward"] for line in lines}) == 2
    for line, other in zip(lines, others, strict=True):
        for name in SAME:
            assert other[name] == pytest.approx(line[name], rel=2e-3, abs=2e-5), name
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert any((one[name] - data["start"][name]).abs().max() > 1e-3 for name in one)


@pytest.mark.soak
def test_a_server_that_is_not_there_ends_the_run_on_every_rank(data: dict[str, str]) -> None:
    for engine, sentence in (
        ("nobody", "--dr-rl-engine failed on rank 0: RuntimeError"),
        ("nothing", "--dr-rl-engine 'tests.mcore._engines:nothing' can't be"),
        ("serve --context-parallel-size 2", "rollouts"),
    ):
        more = f"{from_base(data)} --dr-rl-engine tests.mcore._engines:{engine}"
        ended = _rl.run(data, more, 1, 2)
        assert [code for code, *_ in ended] == [2, 2]
        assert f"megatron_dr: error: {sentence}" in ended[0][2] and "Traceback" not in ended[0][2]


def _answers(
    ids: tuple[int, ...], max_tokens: int = 9, min_tokens: int = 0
) -> tuple[Completion, int]:
    class Fixed:
        loads = 0

        def load(self) -> None:
            self.loads += 1

        def generate(self, prompts: object, params: object, seed: object) -> list[Completion]:
            return [Completion(ids, (0.0,) * len(ids), "stop")]

    engine = Fixed()
    params = SamplingParams(max_tokens, min_tokens=min_tokens)
    (found,) = EngineRollouts(engine, 5, 10).generate([[1, 2]], params, 0)
    return found, engine.loads


def test_what_an_engine_gives_is_checked_and_cut() -> None:
    for max_tokens, room in ((9, 3), (2, 2)):
        for found, loads in run_ranks(2, _answers, (3, 4, 5, 6), max_tokens):
            assert found == Completion((3, 4, 5)[:room], (0.0,) * room, "length") and loads == 1
    with pytest.raises(Exception, match="completion 0 has ids outside of the vocabulary of 10"):
        run_ranks(2, _answers, (3, 10))
    with pytest.raises(Exception, match="completion 0 ends after 2 tokens, .* the 2 asked for"):
        run_ranks(1, _answers, (3, 4), 9, 2)
    assert run_ranks(1, _answers, (3, 4), 9, 1)[0][0].ids == (3, 4)
