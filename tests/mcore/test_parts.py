"""A feature is one entry of a list: a new one gets its flags, its refusal and its calls by it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.config.fields import flag as field_
from megatron_dr.mcore.compat import newest
from megatron_dr.mcore.loop import parts, validation
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args
from megatron_dr.mcore.refuse import rules
from megatron_dr.mcore.seams.part import Part


@dataclass(frozen=True)
class EchoConfig:
    times: int = field_(2, "how often; switches it on", "count")
    text: str = field_("again", "what", "text")


class EchoPart(Part):
    name, config, switch, flag = "echo", EchoConfig, "times", "--dr-echo-times"
    who, refused = "--dr-echo-times does not go with", rules({"mock_data": "it needs real data"})

    def defaults(self, own: EchoConfig, given: dict[str, Any]) -> None:
        given.setdefault("set", "mean")

    def on_model(self, own: EchoConfig, args: argparse.Namespace) -> Callable[..., Any]:
        return lambda model: model + [own.text] * own.times


@pytest.fixture(autouse=True)
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PARTS", [*parts.PARTS, EchoPart()])


def parse(*flags: str) -> argparse.Namespace:
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    return parser.parse_args(flags)


def test_its_flags_are_there() -> None:
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    assert "how often; switches it on [count] (default: off)" in text
    assert "what [text] (default: again)" in text
    assert EchoPart().of(parse("--dr-echo-times", "3")) == EchoConfig(3)
    with pytest.raises(ValueError, match="--dr-echo-text needs --dr-echo-times: give it, or drop"):
        configs_from_args(parse("--dr-echo-text", "x"))


def test_its_defaults_switch_the_plugin_on() -> None:
    found = configs_from_args(parse("--dr-echo-times", "3"))
    assert found is not None and found[0].set == "mean"
    assert configs_from_args(parse()) is None


def test_what_it_refuses_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    called = []

    def stock(args: argparse.Namespace) -> None:
        args.data_parallel_size = 1  # as Megatron's own checks set it
        called.append(args)

    validate = lambda *flags: validation.validate(stock, parse(*flags))  # noqa: E731
    with pytest.raises(SystemExit) as end:
        validate("--dr-echo-times", "3", "--mock-data")
    assert end.value.code == 2 and not called
    assert (
        "megatron_dr: error: --dr-echo-times does not go with --mock-data (it needs real data): "
        "drop it." in capsys.readouterr().err
    )
    validate("--mock-data")
    assert len(called) == 1


def test_it_changes_the_model() -> None:
    seen: list[object] = []
    model = SimpleNamespace(pre_wrap_hooks=[])
    named = {"cfg_container": SimpleNamespace(model=model)}
    change = newest.change_model
    assert change((), named, seen.append, parts.hooks(parse("--dr-echo-times", "2"))) == ()
    assert seen == [model]
    (hook,) = model.pre_wrap_hooks
    assert hook(["chunk"]) == ["chunk", "again", "again"]
    assert parts.hooks(parse()) == []
    with pytest.raises(ValueError, match="--dr-echo-times needs a training script that gives"):
        change((), {}, seen.append, parts.hooks(parse("--dr-echo-times", "2")))
