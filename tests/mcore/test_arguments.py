"""Flags: one group, each with its unit and default; what they become."""

import argparse
import dataclasses
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import WATCHING, TargetConfig
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args
from megatron_dr.mcore.loop.parts import PARTS as LIST

from ._flags import FIELDS, configs, option, parse, refusal

TITLE = "megatron-dr (data-regularised post-training):"
WITH_FIELDS = {part.name: part for part in LIST if part.config}
PARTS = {
    f"{name}_{f.name}": (f, f.name == part.switch)
    for name, part in WITH_FIELDS.items()
    for f in dataclasses.fields(part.config)
    if f.metadata
}
OTHERS = ("device", "pack", "thoughts", "changed_ok", "config")


def test_help_has_all_flags_under_one_title(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parser = argparse.ArgumentParser(usage="...")
    parser.add_argument_group("another").add_argument("--other")
    text = add_arguments(parser).format_help()
    assert text.count(TITLE) == 1
    before, after = text.split(TITLE)
    ours, *rest = after.split("\n\n")
    for name in (*FIELDS, *PARTS, *OTHERS):
        assert f"\n  {option(name)}" in ours
    assert "--dr-" not in before + "".join(rest) and "--other" in before


def test_help_beside_megatrons_flags() -> None:
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    assert parser.format_help().count(TITLE) == 1


def test_every_flag_has_a_unit_and_a_default() -> None:
    parser = add_arguments(argparse.ArgumentParser())
    (group,) = [g for g in parser._action_groups if TITLE.startswith(str(g.title))]
    actions = {o: a for a in group._group_actions for o in a.option_strings}
    assert set(actions) == {option(name) for name in (*FIELDS, *PARTS, *OTHERS)}
    for action in actions.values():
        assert action.help is not None
        assert "[" in action.help and action.help.count("(default: ") == 1
    for name, field in FIELDS.items():
        default = "none" if field.default is None else field.default
        expected = f"[{field.metadata['unit']}] (default: {default})"
        if name == "set":
            expected = "[name] (default: off; with --dr-target-data cone)"
        if name == "alpha_style":
            default = "auto where there is a target and no dial of alpha or beta is given, else"
            expected = f"[name] (default: {default} constant)"
        assert actions[option(name)].help == f"{field.metadata['help']} {expected}"


# rl and dpo need the plugin: test_rl_flags, test_dpo
@pytest.mark.parametrize("name", [n for n in PARTS if not n.startswith(("rl_", "dpo_"))])
def test_a_part_of_its_own(name: str) -> None:
    """Its switch turns it on, its other flags need the switch, and the plugin stays off."""
    field, is_switch = PARTS[name]
    part = WITH_FIELDS[name.split("_")[0]]
    switch = f"{part.name}_{part.switch}"
    args = parse(option(switch), "4", *([] if is_switch else [option(name), str(field.default)]))
    config = part.of(args)
    assert configs_from_args(args) is None and config is not None
    assert getattr(config, field.name) == (field.type("4") if is_switch else field.default)
    assert all(other is part or other.of(args) is None for other in LIST)
    if not is_switch:
        with pytest.raises(ValueError, match=f"{option(name)} needs {option(switch)}"):
            part.of(parse(option(name), str(field.default)))


def test_flags_do_not_disturb_megatrons() -> None:
    stock = add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    both = add_arguments(add_megatron_arguments(argparse.ArgumentParser())).parse_args([])
    added = vars(both).keys() - vars(stock).keys()
    assert added == {f"dr_{name}" for name in (*FIELDS, *PARTS, *OTHERS)}
    assert {k: v for k, v in vars(both).items() if k not in added} == vars(stock)
    assert configs_from_args(both) is None and configs_from_args(stock) is None


def test_no_flag_is_no_plugin() -> None:
    assert configs_from_args(parse()) is None
    assert configs_from_args(parse("--dr-device", "cpu")) is None


@pytest.mark.parametrize("environment, expected", [(None, "cuda"), ("cpu", "cpu")])
def test_device_default(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, expected: str
) -> None:
    monkeypatch.delenv("MEGATRON_DR_DEVICE", raising=False)
    if environment is not None:
        monkeypatch.setenv("MEGATRON_DR_DEVICE", environment)
    assert parse().dr_device == expected
    assert parse("--dr-device", "cuda").dr_device == "cuda"


TARGET = {
    "target_data": (("law", "target.jsonl"), ("med", "a=b.jsonl")),
    "target_batch_size": 4,
    "target_weights": (("law", 2.0),),
    "target_valid_data": (("med", "heldout.jsonl"),),
    "target_test_data": "test.jsonl",
    "keep_best": True,
    "metrics": "metrics.jsonl",
    "generate": "asked.jsonl",
    "generate_metrics": "rouge_l",
    "generate_tokens": 7,
    "record": "r",
    "record_every": 3,
    "record_rows": 5,
}
SKETCHED = {
    "set": "greedy",
    "fraction": 0.5,
    "step_length": 0.2,
    "alpha": 0.2,
    "beta": 0.25,
    "alpha_style": "cosine",
    "end_alpha": 0.4,
    "norm": "target",
    "rows": "slot",
    "slots": 4,
    "slot_dtype": "bf16",
    "blocks": "layer",
    "gram": "sketch",
    "sketch_size": 64,
    "seed": 7,
    "log_blocks": True,
}
EXACT = {
    "set": "ball", "radius": 0.1, "ridge": 0.7, "rows": "rank", "gram": "exact", "target_ranks": 1,
    "row_ranks": 1, "alpha_style": "constant", "targets": "mean",
}  # fmt: skip
SIZED = {"set": "hull", "rows": "domain", "sketch_error": 0.1, "alpha": 0.3}
AUTO = {
    "rows": "auto", "memory": 0.2, "alpha_style": "auto", "keep_general": 0.6,
    "on_bad_gradient": "mean", "stall_seconds": 7.5,
}  # fmt: skip
SAMPLES = {
    "set": "topk", "rows": "sample", "norm": "tokens", "blocks": "layer", "score": "sketched",
    "kronecker_out": 16, "kronecker_in": 8, "window": "step", "passes": 2, "target_pass": "own",
    "target_refresh": 3, "alpha": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("values", [SKETCHED, EXACT, SIZED, SAMPLES, AUTO])
def test_round_trip(values: dict[str, Any]) -> None:
    assert FIELDS.keys() == {n for v in (SKETCHED, EXACT, SIZED, SAMPLES, AUTO, TARGET) for n in v}
    flags = []
    for name, value in {**values, **TARGET}.items():
        if isinstance(value, tuple):
            flags += [option(name), *(f"{key}={one}" for key, one in value)]
        else:
            flags += [option(name)] if value is True else [option(name), str(value)]
    assert configs(*flags) == (DRConfig(**values), TargetConfig(**TARGET))


# What a flag may be given beside: one of these gives each of them a meaning.
BESIDE = ("", "--dr-set greedy", "--dr-set ball", "--dr-alpha-style linear", "--dr-rows sample",
          "--dr-alpha-style auto", "--dr-generate a.jsonl", "--dr-record r")  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_given_is_the_default(name: str) -> None:
    default = FIELDS[name].default
    if default is None or default is False:
        return
    flag = (option(name), str(default))
    beside = next(more.split() for more in BESIDE if not refusal(*flag, *more.split()))
    base = ["--dr-target-data", "t.jsonl", *beside]
    if name in ("alpha", "beta", "alpha_style"):  # of a constant alpha
        base += ["--dr-beta", "0"] if name == "alpha" else ["--dr-alpha", "0.05"]
    assert configs(*base, *flag) == configs(*base)


def test_target_data_alone_switches_on_with_the_defaults() -> None:
    dr = DRConfig(alpha_style="auto")
    assert configs("--dr-target-data", "t.jsonl") == (dr, TargetConfig("t.jsonl"))


@pytest.mark.parametrize(
    "more, style",
    [
        ("--dr-alpha 0", "constant"),
        ("--dr-beta 0.5", "constant"),
        ("--dr-set target", "constant"),
        ("--dr-alpha-style linear", "linear"),
        ("--dr-set mean", "auto"),
        ("--dr-rows sample", "auto"),
        ("--dr-keep-general 0.5", "auto"),
    ],
)
def test_alpha_is_chosen_where_nothing_is_said_of_it(more: str, style: str) -> None:
    assert configs("--dr-target-data", "t.jsonl", *more.split())[0].alpha_style == style


def test_mean_needs_no_target_data() -> None:
    assert configs("--dr-set", "mean") == (DRConfig(set="mean"), TargetConfig())
    assert configs("--dr-set", "mean", "--dr-alpha", "0")[0].alpha == 0.0
    assert configs("--dr-set", "mean", "--dr-target-data", "t")[1].target_data == "t"


def test_target_with_its_own_alpha() -> None:
    flags = ("--dr-set", "target", "--dr-target-data", "t.jsonl", "--dr-alpha", "1")
    assert configs(*flags)[0].alpha == 1.0


ENOUGH = {"set", "target_data", *WATCHING}


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - ENOUGH))
def test_flag_without_set_or_target_data(name: str) -> None:
    field = FIELDS[name]
    value = [] if field.type is bool else [str(field.default or 8)]
    with pytest.raises(ValueError, match=f"^{option(name)} given without --dr-set or --dr-target"):
        configs_from_args(parse(option(name), *value))


def test_watching_alone_leaves_the_step_to_megatron() -> None:
    dr, target = configs(
        "--dr-metrics", "m.jsonl", "--dr-target-valid-data", "v.jsonl", "--dr-keep-best"
    )
    assert dr.set == "mean" and target.target_data is None
    assert (target.metrics, target.target_valid_data) == ("m.jsonl", "v.jsonl")


@pytest.mark.parametrize("name", ["generate_metrics", "generate_tokens"])
def test_what_is_of_answers_needs_them(name: str) -> None:
    said = refusal(option(name), str(FIELDS[name].default))
    assert said == f"{option(name)} needs --dr-generate: give it, or drop the flag."


NAMED = "--dr-target-data law=a.jsonl med=b.jsonl"
WRONG_SETS = {
    "--dr-target-data law=a.jsonl b.jsonl": "--dr-target-data b.jsonl: where there are several",
    "--dr-target-data law=a.jsonl law=b.jsonl": "--dr-target-data has law twice",
    f"{NAMED} --dr-target-weights nat=2": "--dr-target-weights has nat, but --dr-target-data has "
    "law, med: give both the same names.",
    f"{NAMED} --dr-target-weights 2": "--dr-target-weights 2.0: a weight is of a set",
    f"{NAMED} --dr-target-weights law=0": "target_weights must be finite and above 0, not 0.0.",
    f"{NAMED} --dr-target-weights law=nan": "target_weights must be finite and above 0, not nan.",
    f"{NAMED} --dr-target-weights law=x": "--dr-target-weights x: a number is needed.",
    f"{NAMED} --dr-target-batch-size law=1.5": "--dr-target-batch-size 1.5: a whole number is",
    f"{NAMED} --dr-target-batch-size law=0": "target_batch_size must be at least 1, not 0.",
    f"{NAMED} --dr-target-batch-size nat=4": "--dr-target-batch-size has nat, but",
    f"{NAMED} --dr-target-valid-data nat=c.jsonl": "--dr-target-valid-data has nat, but",
    "--dr-target-data a.jsonl --dr-targets maximin": "--dr-targets maximin needs several target",
    f"{NAMED} --dr-targets maximin --dr-target-weights law=2": "maximin finds the weights",
    f"{NAMED} --dr-targets maximin --dr-rows sample": "does not go with rows='sample'",
    f"{NAMED} --dr-targets maximin --dr-rows rank --dr-target-ranks 1": "with target_ranks=1",
    f"{NAMED} --dr-targets maximin --dr-alpha-style auto": "and alpha_style='auto' one for each",
    f"{NAMED} --dr-targets maximin --dr-on-bad-gradient mean": "as on_bad_gradient='mean' does",
    f"{NAMED} --dr-rows sample --dr-target-pass merged": "--dr-target-pass merged takes one target",
    "--dr-target-data a.jsonl --dr-target-weights law=2": "--dr-target-data has no names",
    "--dr-set mean --dr-target-weights law=2": "--dr-target-weights has law, but --dr-target-data",
}


@pytest.mark.parametrize("flags, sentence", WRONG_SETS.items())
def test_sets_that_do_not_fit_together(flags: str, sentence: str) -> None:
    with pytest.raises(ValueError) as refused:
        configs(*flags.split())
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_held_out_sets_have_weights() -> None:
    """Those of the target sets of their names; without any, alike."""
    target = configs(*f"{NAMED} --dr-target-weights law=3".split())[1]
    assert target.weights_of(("law", "med")) == {"law": 0.75, "med": 0.25}
    assert target.weights_of(("med",)) == {"med": 1.0}
    plain = configs("--dr-target-data", "a.jsonl", "--dr-target-valid-data", "x=b", "y=c")[1]
    assert plain.weights_of(("x", "y")) == {"x": 0.5, "y": 0.5}
    assert [(s.name, s.path, s.batch) for s in target.target_sets] == [
        ("law", "a.jsonl", 8), ("med", "b.jsonl", 8),
    ]  # fmt: skip
