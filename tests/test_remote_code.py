"""A model's own Python does not run: not where a tokenizer is read, a model, or a reward model."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from megatron_dr.cli import prepare, verify  # noqa: E402
from megatron_dr.hf.source import Source  # noqa: E402
from megatron_dr.rl.reward_model import RewardModel  # noqa: E402

from .hf import _convert  # noqa: E402
from .rl import _reward_model  # noqa: E402

MODULE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
"""
OWN = {
    "config.json": {
        "AutoConfig": "own.LlamaConfig", "AutoModelForCausalLM": "own.LlamaForCausalLM",
        "AutoModelForSequenceClassification": "own.LlamaForSequenceClassification",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["own.PreTrainedTokenizerFast", None]},
}  # fmt: skip


def _with_own_code(folder: Path, mark: Path, known: bool) -> None:
    """The files name code beside them; `known`: transformers has classes of these names, too."""
    (folder / "own.py").write_text(MODULE.format(mark=str(mark)))
    for name, classes in OWN.items():
        path = folder / name
        table = json.loads(path.read_text()) if path.exists() else {}
        table.setdefault("model_type", "llama")
        if not known:
            table |= {"model_type": "own"} if name == "config.json" else {"tokenizer_class": "Own"}
        path.write_text(json.dumps(table | {"auto_map": classes}))


def _prepared(folder: Path) -> None:
    prepare.load_chat(Namespace(tokenizer=str(folder)), None)


def _verified(folder: Path) -> None:
    verify.tokens_of(Namespace(source=str(folder), prompt="a"), 264)


def _compared(folder: Path) -> None:
    verify.expected_logits(Source(folder), torch.ones(1, 4, dtype=torch.int64))


def _converted(folder: Path) -> None:
    _convert.run("hf-to-mcore", folder, folder.parent / "mcore")


def _rewarded(folder: Path) -> None:
    RewardModel(folder, "cpu")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("read", [_prepared, _verified, _compared, _converted, _rewarded])
def test_it_does_not_run(
    tmp_path: Path, read: Callable[[Path], None], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked, as transformers does where nothing is said."""
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks"))
    folder, mark = tmp_path / "model", tmp_path / "mark"
    if read in (_compared, _converted):
        _convert.make(folder)
    else:
        folder.mkdir()
        _reward_model.llama(folder)
    _with_own_code(folder, mark, known)
    try:
        read(folder)
    except Exception:  # the libraries' many kinds; a test that fails is none
        assert not known or read in (_compared, _converted)  # whose configuration is a bare one
    assert not mark.exists()
