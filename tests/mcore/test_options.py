"""Each field of Megatron's configurations is supported, harmless or refused; a new one fails here,
and is named when the plugin is attached."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
from megatron.core import __version__
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_dr.mcore.compat import contract, listed, refusals, until_0_18
from megatron_dr.mcore.refuse import SWITCH_OFF, refuse

KINDS = (TransformerConfig, MLATransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
HAVE = {name for kind in KINDS for name in listed.fields(kind)}
RULES = (*refusals.OF_MODEL, *refusals.OF_DDP)


def test_every_field_is_in_one_section() -> None:
    kinds = listed.kinds(listed.OPTIONS)
    assert kinds.keys() == {"supported", "harmless", "refused"}
    counts = Counter(name for names in kinds.values() for name in names)
    assert {name for name, count in counts.items() if count > 1} == set()
    absent = listed.absent(listed.OPTIONS)
    assert absent <= counts.keys(), "of another version, and in no section"
    assert counts.keys() - absent - HAVE == set(), "Megatron has these fields no more"
    assert HAVE & absent == set(), "Megatron has these fields"
    assert HAVE - counts.keys() == set(), "new fields of Megatron: reckon with them, or refuse"


def test_the_refused_are_those_of_the_section() -> None:
    """And each with a reason, or a sentence of its own."""
    of_no_field = {"flextron"}  # an attribute that Megatron's own scripts set
    named = {rule.name for rule in RULES if rule not in until_0_18.OF_MODEL} - of_no_field
    assert named == set(listed.kinds(listed.OPTIONS)["refused"])
    assert all(rule.why or rule.says for rule in RULES)


def test_what_is_refused_is_not_so_by_default() -> None:
    for kind in KINDS[:3]:
        defaults = {
            name: None if f.default is dataclasses.MISSING else f.default
            for name, f in listed.fields(kind).items()
        }
        values = {name: None for name in HAVE} | defaults
        refuse("x", RULES, SimpleNamespace(**values), SWITCH_OFF)


@dataclasses.dataclass
class Later(TransformerConfig):
    """As a version after this one has it."""

    gradients_by_post: bool = False


Later.__module__ = "megatron.core.transformer.transformer_config"


@dataclasses.dataclass
class OfHost(TransformerConfig):
    vocabulary: int = 0


def test_a_new_field_is_named_in_one_sentence() -> None:
    known = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert listed.unknown_fields(known, DistributedDataParallelConfig()) == ""
    assert listed.unknown_fields(OfHost(num_layers=1, hidden_size=8, num_attention_heads=1)) == ""
    later = Later(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert listed.unknown_fields(known, later) == (
        f"warning: nobody has looked at what these fields of megatron-core {__version__} do to "
        "gradients, schedules or checkpoints: gradients_by_post; leave them as they are by default."
    )


def test_attach_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(contract, "say", said.append)
    later = Later(num_layers=1, hidden_size=8, num_attention_heads=1)
    contract.warn(later, DistributedDataParallelConfig())
    contract.warn(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    assert len(said) == 1 and "gradients_by_post" in said[0]
