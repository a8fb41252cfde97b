"""Flags that contradict each other, are out of range or have no value: one sentence each."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import pytest

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.kinds import FEASIBLE_SETS
from megatron_dr.mcore.loop.arguments import configs_from_args
from megatron_dr.projection import alpha_at

from ._flags import option, parse, refusal

CHOICES = {f.name: get_args(f.type) for f in dataclasses.fields(DRConfig)}
# A flag, another one that may take its meaning, and what would then not depend on it any more.
READ: list[tuple[str, str, str, Callable[[DRConfig], Any]]] = [
    ("fraction", "0.75", "set", DRConfig.feasible_set),
    ("ridge", "0.75", "set", DRConfig.feasible_set),
    ("radius", "0.25", "set", DRConfig.feasible_set),
    ("step_length", "0.25", "set", DRConfig.feasible_set),
    ("slots", "6", "rows", lambda dr: dr.num_slots),
    ("end_alpha", "0.5", "alpha_style", lambda dr: alpha_at(dr.alpha_style, 0.1, dr.end_alpha, 1, 2)
     if dr.alpha_style != "auto" else None),
]  # fmt: skip
PAIRS = [(*case, value) for case in READ for value in CHOICES[case[2]]]


@pytest.mark.parametrize("name, given, other, read, value", PAIRS)
def test_a_flag_is_taken_where_it_is_read(
    name: str, given: str, other: str, read: Callable[[DRConfig], Any], value: str
) -> None:
    plain = DRConfig(**{other: value})  # type: ignore[arg-type]
    kind = int if name == "slots" else type(getattr(plain, name))
    changed = dataclasses.replace(plain, **{name: kind(given)})
    message = f"{option(name)} has no meaning with {option(other)} {value}: drop one of them."
    said = refusal(option(name), given, option(other), value)
    assert said == ("" if read(changed) != read(plain) else message)


@pytest.mark.parametrize(
    "flag, taken, refused",
    [
        ("--dr-slot-dtype bf16", "--dr-rows domain", "--dr-rows rank"),
        ("--dr-gram exact", "--dr-rows rank", "--dr-rows sample"),
        ("--dr-sketch-size 64", "--dr-gram auto", "--dr-gram exact"),
        ("--dr-sketch-error 0.1", "--dr-gram sketch", "--dr-gram exact"),
        ("--dr-sketch-size 64", "--dr-rows slot", "--dr-rows sample"),
        ("--dr-score exact", "--dr-rows sample", "--dr-rows slot"),
        ("--dr-beta 0.5", "--dr-alpha-style linear", "--dr-alpha-style auto"),
        ("--dr-beta 0.5", "--dr-set topk", "--dr-set mean"),
        ("--dr-beta 0.5", "--dr-set halfspace", "--dr-set target"),
        ("--dr-keep-general 0.5", "--dr-alpha-style auto", "--dr-alpha-style constant"),
        ("--dr-kronecker-out 8", "--dr-rows sample", "--dr-rows domain"),
        ("--dr-kronecker-in 8", "--dr-rows sample", "--dr-rows rank"),
        ("--dr-window step", "--dr-rows sample", "--dr-rows slot"),
        ("--dr-passes 2", "--dr-rows sample", "--dr-rows domain"),
        ("--dr-target-pass merged", "--dr-rows sample", "--dr-rows rank"),
        ("--dr-target-refresh 1", "--dr-rows sample", "--dr-rows slot"),
    ],
)
def test_a_flag_beside_one_that_takes_its_meaning(flag: str, taken: str, refused: str) -> None:
    assert refusal(*flag.split(), *taken.split()) == ""
    said = refusal(*flag.split(), *refused.split())
    assert said == f"{flag.split()[0]} has no meaning with {refused}: drop one of them."


NEEDING_TARGET = [n for n in FEASIBLE_SETS if n != "mean"]
CONTRADICTIONS = [
    (
        "--dr-set target --dr-target-data t --dr-alpha-style linear",
        "--dr-alpha-style has no meaning with --dr-set target",
    ),
    (
        "--dr-target-data t --dr-alpha-style auto --dr-alpha 0.5",
        "--dr-alpha has no meaning with --dr-alpha-style auto",
    ),
    (
        "--dr-target-data t --dr-sketch-size 64 --dr-sketch-error 0.1",
        "--dr-sketch-error sets the sketch's size, and so does --dr-sketch-size",
    ),
    (
        "--dr-set mean --dr-alpha-style auto",
        "--dr-set mean with --dr-alpha-style auto needs --dr-target-data",
    ),
    (
        "--dr-set target --dr-target-data t --dr-alpha 0.5",
        "--dr-alpha has no meaning with --dr-set target",
    ),
    ("--dr-set mean --dr-target-batch-size 4", "--dr-target-batch-size needs --dr-target-data"),
    ("--dr-set cone --dr-target-batch-size 4", "--dr-target-batch-size needs --dr-target-data"),
    ("--dr-set mean --dr-alpha 0.5", "--dr-alpha needs --dr-target-data"),
    *[(f"--dr-set {n}", f"--dr-set {n} needs --dr-target-data") for n in NEEDING_TARGET],
]


@pytest.mark.parametrize("flags, message", CONTRADICTIONS)
def test_contradiction_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: .*\\.$"):
        configs_from_args(parse(*flags.split()))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dr-alpha 2", "alpha must be in"),
        ("--dr-slots 0", "slots must be at least 1"),
        ("--dr-ridge -1", "ridge must be finite"),
        ("--dr-sketch-size 100", "sketch_size must be a power of two"),
        ("--dr-target-batch-size 0", "target_batch_size must be at least 1"),
    ],
)
def test_out_of_range_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configs_from_args(parse("--dr-target-data", "t.jsonl", *flags.split()))


@pytest.mark.parametrize(
    "flags",
    ["--dr-rows corpus", "--dr-slots two", "--dr-alpha x", "--dr-log-blocks 1"],  # fmt: skip
)
def test_what_is_no_value_of_a_flag_ends_the_parser(flags: str) -> None:
    with pytest.raises(SystemExit) as end:
        parse(*flags.split())
    assert end.value.code == 2
