"""The plugin's flags, parsed, and what is said of them."""

import argparse
import dataclasses

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore.loop.arguments import add_arguments, configs_from_args

FIELDS = {f.name: f for c in (DRConfig, TargetConfig) for f in dataclasses.fields(c) if f.metadata}


def option(name: str) -> str:
    return "--dr-" + name.replace("_", "-")


def parse(*flags: str) -> argparse.Namespace:
    return add_arguments(argparse.ArgumentParser()).parse_args(flags)


def configs(*flags: str) -> tuple[DRConfig, TargetConfig]:
    found = configs_from_args(parse(*flags))
    assert found is not None
    return found


def refusal(*flags: str) -> str:
    """What is said of flags beside target data; nothing where they are taken."""
    try:
        configs("--dr-target-data", "t.jsonl", *flags)
    except ValueError as error:
        return str(error)
    return ""
