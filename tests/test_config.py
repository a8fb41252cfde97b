"""The configuration refuses what is out of range, in a sentence that names the dial."""

import copy
import dataclasses
import math
import pickle
from typing import Any, get_args

import pytest
import torch

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.fields import choices
from megatron_dr.config.kinds import FEASIBLE_SETS, ROW_KINDS
from megatron_dr.config.target import TargetConfig

from .mcore._problem import Problem, solve


def test_every_kind_of_rows_declares_itself() -> None:
    (field,) = [f for f in dataclasses.fields(DRConfig) if f.name == "rows"]
    assert tuple(ROW_KINDS) == get_args(field.type)


def test_every_set_is_in_the_flags_help() -> None:
    (field,) = [f for f in dataclasses.fields(DRConfig) if f.name == "set"]
    assert all(f" {name}," in field.metadata["help"] for name in FEASIBLE_SETS)


@pytest.mark.parametrize("table", [FEASIBLE_SETS, ROW_KINDS])
def test_dials_are_fields(table: dict[str, Any]) -> None:
    fields = {f.name for f in dataclasses.fields(DRConfig)}
    assert all(fields.issuperset(each.dials) for each in table.values())


@pytest.mark.parametrize("name", FEASIBLE_SETS)
def test_every_set_is_the_one_of_its_name_with_its_dials(name: Any) -> None:
    """By weights: those of a dense solver that knows the sets' equations by their names."""
    dials = {"set": name, "fraction": 0.25, "ridge": 0.7, "radius": 0.2, "step_length": 0.1}
    noise = torch.Generator().manual_seed(1)
    rows, target = (torch.randn(n, 30, generator=noise, dtype=torch.float64) for n in (8, 1))
    target += rows.sum(0)
    weights = DRConfig(**dials).feasible_set().weights((rows @ rows.T)[None], target @ rows.T)
    expected = solve(Problem(**dials), rows.numpy(), target[0].numpy())
    torch.testing.assert_close(weights[0], torch.from_numpy(expected * 1.0), rtol=0, atol=1e-5)


OUT_OF_RANGE = [
    ("set", "sphere", {}),
    ("gram", "exactly", {}),
    ("alpha_style", "exponential", {}),
    ("end_alpha", -0.1, {}),
    ("end_alpha", 1.5, {"alpha_style": "linear"}),
    ("alpha_steps", -1, {"alpha_style": "linear"}),
    ("alpha_steps", 0, {"alpha_style": "cosine"}),
    ("radius", -0.5, {"set": "ball"}),
    ("radius", math.nan, {"set": "ball"}),
    ("step_length", -0.1, {"set": "greedy"}),
    ("step_length", math.nan, {"set": "greedy"}),
    ("target_ranks", -1, {"rows": "rank"}),
    ("target_ranks", 1, {"rows": "slot"}),
    ("sketch_error", 0.0, {}),
    ("sketch_error", 1.0, {}),
    ("domains", ("a", "a"), {}),
    ("set", None, {}),
    ("norm", "mean", {}),
    ("rows", "Slot", {}),
    ("slot_dtype", "fp16", {}),
    ("blocks", "tensor", {}),
    ("alpha", -0.1, {}),
    ("alpha", 1.01, {}),
    ("alpha", math.nan, {}),
    ("beta", 1.5, {}),
    ("keep_general", -0.5, {"alpha_style": "auto"}),
    ("slots", 0, {}),
    ("slots", -1, {"rows": "rank"}),
    ("slots", 1, {}),  # with rows='slot' it is rows='rank'
    ("sketch_size", 0, {}),
    ("sketch_size", 1, {}),
    ("sketch_size", 1000, {}),
    ("sketch_size", -64, {}),
    *[
        ("fraction", f, {"set": s})
        for s in ("topk", "greedy", "filter", "capped")
        for f in (0.0, -0.5, 1.5, math.nan)
    ],
    *[
        ("ridge", r, {"set": s})
        for s in ("capped", "hull", "cone", "span")
        for r in (-0.1, math.nan, math.inf)
    ],
]


@pytest.mark.parametrize("name, value, others", OUT_OF_RANGE)
def test_out_of_range_is_refused(name: str, value: Any, others: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b.*\.$|^rows='slot' with slots=1 .*\.$") as e:
        DRConfig(**{name: value}, **others)
    if name not in ("target_ranks", "domains"):
        assert str(value) in str(e.value)


@pytest.mark.parametrize("size", [0, -1])
def test_target_batch_size_out_of_range(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^target_batch_size must be at least 1, not {size}\.$"):
        TargetConfig(target_batch_size=size)


@pytest.mark.parametrize(
    "dials",
    [
        {"alpha": 0.0},
        {"alpha": 1.0},
        {"set": "topk", "fraction": 1.0},
        {"ridge": 0.0},
        {"slots": 2},
        {"slots": 1, "rows": "rank"},
        {"sketch_size": 2},
        {"seed": -1},
    ],
)
def test_ends_of_the_ranges_are_allowed(dials: dict[str, Any]) -> None:
    dr = DRConfig(**dials)
    assert {name: getattr(dr, name) for name in dials} == dials


@pytest.mark.parametrize(
    "name, value, others",
    [
        ("sketch_size", 2**32, {}),
        ("fraction", 9.0, {"set": "cone"}),
        ("ridge", -1.0, {"set": "mean"}),
    ],
)
def test_out_of_range_is_refused_here_and_whatever_the_set(
    name: str, value: Any, others: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        DRConfig(**{name: value}, **others)


def test_every_choice_is_checked() -> None:
    plain = (float, int, bool, str, int | None, float | None, tuple[str, ...])
    names = {f.name for f in dataclasses.fields(DRConfig) if f.type not in plain}
    assert names and names == set(choices(DRConfig))


@pytest.mark.parametrize("name, choices", choices(DRConfig).items())
def test_every_choice_is_allowed(name: str, choices: tuple[str, ...]) -> None:
    streaming = {"rows": "sample", "set": "topk", "blocks": "matrix"}
    others = {"tokens": {"rows": "sample"}, "streaming": streaming}
    for choice in choices:
        dr = DRConfig(**{name: choice, **others.get(choice, {})})  # type: ignore[arg-type]
        assert getattr(dr, name) == choice


@pytest.mark.parametrize(
    "dials, words",
    [
        ({"norm": "tokens", "rows": "slot"}, "norm='tokens' needs rows='sample'"),
        ({"passes": 3}, "passes must be 1 or 2, not 3"),
        ({"kronecker_in": 0}, "kronecker_in must be at least 1"),
        ({"target_refresh": 0}, "target_refresh must be at least 1"),
        ({"set": "halfspace"}, "needs target_pass='merged'"),
        ({"window": "streaming"}, "window='streaming' needs set='topk'"),
        ({"target_refresh": 2}, "needs target_pass='own' and alpha=0"),
        ({"target_refresh": 2, "alpha": 0.0, "target_pass": "merged"}, "needs target_pass='own'"),
    ],
)
def test_what_sample_rows_refuse(dials: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DRConfig(**{"rows": "sample", **dials})


def test_equal_by_value_and_hashable() -> None:
    one, same, other = DRConfig(seed=1), DRConfig(seed=1), DRConfig(seed=2)
    assert one == same and hash(one) == hash(same) and one != other
    assert {one, same, other} == {one, other}
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert len({TargetConfig("a"), TargetConfig("a"), TargetConfig("b")}) == 2


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DRConfig().alpha = 2.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="^alpha"):
        dataclasses.replace(DRConfig(), alpha=2.0)


@pytest.mark.parametrize("name", FEASIBLE_SETS)
def test_what_follows_from_the_set(name: Any) -> None:
    weighs_rows = name not in ("mean", "target")
    dr = DRConfig(set=name, slots=4, alpha=0.25)
    assert dr.num_slots == (4 if weighs_rows else 1)
    assert DRConfig(set=name, slots=4, rows="rank").num_slots == 1
    assert dr.needs_target == (name != "mean")
    assert DRConfig(set="mean", alpha_style="auto").needs_target
    assert DRConfig(set=name, rows="domain", domains=("a", "b", "c")).num_slots == 3


@pytest.mark.parametrize("cls", [DRConfig, TargetConfig])
def test_every_dial_says_what_it_is(cls: Any) -> None:
    no_flags = ("alpha_steps", "target_size", "target_sets", "domains", "packed", "sequences")
    for field in dataclasses.fields(cls):
        if field.name in no_flags:
            continue
        assert field.metadata["help"] and field.metadata["unit"]
