"""Each of Megatron's flags is honoured, harmless or refused; one of a new version fails here."""

import argparse
import dataclasses
import re
from collections import Counter
from functools import cache
from pathlib import Path

import megatron.training
import pytest
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.training.arguments import add_megatron_arguments

from megatron_dr.mcore import cpu, errors
from megatron_dr.mcore.compat import listed
from megatron_dr.mcore.loop import script_flags, validation

OURS = Path(__file__).parents[2] / "megatron_dr" / "mcore"
LIBRARY = Path(megatron.training.__file__).parents[1]
# the room that does what an older version leaves to its scripts, too
LIBRARIES = LIBRARY / "core", LIBRARY / "training", OURS / "compat"
# In place of an attribute: read by the optimizer's name before it, or by a list of names.
BY_NAME = re.compile(r"muon_\w+|moe_(deepep|hybridep)_num_sms|rampup_batch_size")


def section(kind: str) -> set[str]:
    """Flags of a section that the installed version has."""
    return set(listed.sections(listed.FLAGS)[kind]) - listed.absent(listed.FLAGS)


@cache
def flags() -> dict[str, list[str]]:
    """Megatron's flags by the name of their argument."""
    parser = add_megatron_arguments(argparse.ArgumentParser())
    found: dict[str, list[str]] = {}
    for action in parser._actions:
        found.setdefault(action.dest, []).extend(action.option_strings)
    del found["help"]
    return found


def attributes(*folders: Path) -> set[str]:
    """Names that are read there as an attribute, or as a string."""
    files = [p for folder in folders for p in folder.rglob("*.py") if "arguments" not in p.name]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    return set(re.findall(r"\.(\w+)\b(?! *=[^=])", text)) | set(
        re.findall(r"[\"'](\w+)[\"']", text)
    )


def test_every_flag_is_in_one_section() -> None:
    kinds = {k: names for k, names in listed.kinds(listed.FLAGS).items() if k != "pretrain_gpt"}
    counts = Counter(name for names in kinds.values() for name in names)
    assert {name for name, count in counts.items() if count > 1} == set()
    absent = listed.absent(listed.FLAGS)
    assert absent <= counts.keys(), "of another version, and in no section"
    assert counts.keys() - absent - flags().keys() == set(), "Megatron has these flags no more"
    assert flags().keys() & absent == set(), "Megatron has these flags"
    assert flags().keys() - counts.keys() == set(), "new flags of Megatron: act on, or refuse"


def test_each_is_read_where_its_section_says() -> None:
    by_library = {n for n in section("library") if not BY_NAME.fullmatch(n)}
    assert by_library - attributes(*LIBRARIES) == set()
    checked = (LIBRARY / "training" / "arguments.py").read_text(encoding="utf-8")
    assert {n for n in section("checked") if f"args.{n}" not in checked} == set()
    assert section("entry") - attributes(OURS) == set()


def test_the_refused_are_those_of_the_section() -> None:
    """No spelling of a flag is forgotten, and no pattern takes one that has an effect."""
    refused = {name for name, options in flags().items() if script_flags.reason(options[0])}
    assert refused == section("refused")
    spellings = [option for name in refused for option in flags()[name]]
    assert [option for option in spellings if script_flags.reason(option) is None] == []
    given = [option for options in flags().values() for option in options]
    given += ["--" + name.replace("_", "-") for name in listed.absent(listed.FLAGS)]
    given.append("--use-same-sampling-seed-across-dp-ranks")  # of one, which is called otherwise
    for patterns in script_flags.REFUSED.values():
        for pattern in patterns.split():
            taken = re.compile(pattern.replace("*", ".*"))
            assert any(taken.fullmatch(option) for option in given), pattern


def test_what_pretrain_gpt_reads_ours_reads_or_refuses() -> None:
    here = attributes(OURS / "loop", OURS / "data")
    for name in section("pretrain_gpt"):
        assert name in here or name in section("refused"), name


def test_megatrons_data_get_every_option() -> None:
    """A field of its dataset configuration is given, or a refused flag's, or no flag's."""
    text = (OURS / "data" / "datasets.py").read_text(encoding="utf-8")
    refused = {"hybrid_context_parallel", "inter_document_masking"}
    no_flag = {
        "drop_last_partial_validation_sequence", "add_extra_token_to_sequence",
        "sft_mock_dataset_config_json", "varlen_mock_dataset_config_json", "varlen_sbhd_validation",
    }  # fmt: skip
    fields = {f.name for f in dataclasses.fields(GPTDatasetConfig) if f.init}
    missing = {name for name in fields if not re.search(rf"\b{name}=", text)}
    assert missing == (refused | no_flag) & fields


def test_a_refusal_names_the_flag_and_what_to_do() -> None:
    script_flags.refuse_given([*cpu.CPU_FLAGS, "--lr", "1e-3", "train.py"])
    for given in (["--lr", "1e-3", "--grpo-kl-beta", "0.1"], ["--grpo-kl-beta=0.1"]):
        with pytest.raises(ValueError) as refused:
            script_flags.refuse_given(given)
        assert str(refused.value) == (
            "megatron_dr.train does not act on --grpo-kl-beta (it is of Megatron's train_rl.py; "
            "here --dr-rl-algorithm trains by rewards): drop it."
        )


VALUES = {
    "mask": ({"reset_attention_mask": True}, "--reset-attention-mask: attention that reads no"),
    "rotary": ({"reset_position_ids": True, "position_embedding_type": "rope"},
               "--reset-position-ids: --position-embedding-type rope does not read"),
    "window": ({"window_size": (4, 0)}, "--window-size (the layers of --dr-device cpu are"),
    "straggler": ({"log_straggler": True}, "--log-straggler (it reads the clock"),
    "softmax": ({"softmax_type": "learnable"}, "--softmax-type (attention of --dr-device cpu"),
    "dense layers": ({"moe_layer_freq": [0, 1], "num_experts": 4}, "--moe-layer-freq (with"),
}  # fmt: skip


@pytest.mark.parametrize("values, sentence", VALUES.values(), ids=VALUES.keys())
def test_a_value_without_effect_is_refused(values: dict[str, object], sentence: str) -> None:
    stock = vars(add_megatron_arguments(argparse.ArgumentParser()).parse_args([]))
    script_flags.refuse_values(argparse.Namespace(**stock))
    with pytest.raises(ValueError, match="^megatron_dr.train does not act on ") as refused:
        script_flags.refuse_values(argparse.Namespace(**{**stock, **values}))
    assert sentence in str(refused.value)


def test_yaml_does_not_switch_the_plugin_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron takes the file in place of the command line."""

    def load(path: str) -> str:
        return f"from {path}"

    monkeypatch.setattr(validation.sys, "argv", ["pretrain_gpt.py", "--yaml-cfg", "a.yaml"])
    assert validation.load_yaml(load, "a.yaml") == "from a.yaml"
    monkeypatch.setattr(
        validation.sys, "argv", ["pretrain_gpt.py", "--yaml-cfg", "a", "--dr-set", "x"]
    )
    said: list[str] = []
    monkeypatch.setattr(errors, "leave", said.append)
    validation.load_yaml(load, "a")
    assert said == [
        "--yaml-cfg takes the place of the command line, and --dr-set would be lost: give "
        "Megatron's flags instead."
    ]
