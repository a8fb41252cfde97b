"""Reward models give the scores of single texts, however they are batched, padded and shared."""

import json
import logging
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from megatron_dr.rl.reward_model import RewardModel  # noqa: E402
from megatron_dr.rl.reward_pool import Sample  # noqa: E402

from . import _reward_model as made  # noqa: E402

PROMPTS = ["a?", "What is it?", "Name one, please: ", "1+1=", "é"]
COMPLETIONS = ["", " It is a long story.", "7", "no", " yes, of course", "ñ", "two of them"]
SAMPLES = [Sample(p, c, None) for p in PROMPTS for c in COMPLETIONS]


def texts(samples: list[Sample], before: str = "", between: str = "", after: str = "") -> Any:
    return [made.encode(f"{before}{s.prompt}{between}{s.completion}{after}") for s in samples]


CASES = {
    "llama": (made.llama, {}, ("<s>",)),
    "llama, padding known": (made.llama, {"pad_token_id": 0}, ("<s>",)),
    "llama, padding outside": (made.llama, {"pad_token_id": -1}, ("<s>",)),
    "llama, chat": (made.llama, {"template": made.TEMPLATE}, ("<s>u:", "</s><s>a:", "</s>")),
    "llama, chat that ends in padding": (  # the model takes the last token that is none
        made.llama,
        {"template": made.TEMPLATE, "pad_token_id": 2},
        ("<s>u:", "</s><s>a:"),
    ),
    "bert": (made.bert, {}, ("<s>", "", "</s>")),
}


@pytest.mark.parametrize("make, options, around", CASES.values(), ids=CASES.keys())
def test_scores_are_those_of_single_texts(
    tmp_path: Path, make: Any, options: dict[str, Any], around: tuple[str, ...]
) -> None:
    model = make(tmp_path, **options)
    expected = [made.expected(model, ids) for ids in texts(SAMPLES, *around)]
    assert max(expected) - min(expected) > 0.1  # they differ, so that a mix-up shows
    state = torch.get_rng_state()
    for batch_size in (1, 3, 64):
        reward = RewardModel(tmp_path, "cpu", batch_size=batch_size)
        found = reward.score(SAMPLES)
        assert found.rewards == pytest.approx(expected, abs=1e-5) and not found.failures
    for rank in range(3):  # shares of ranks
        share = reward.score(SAMPLES[rank::3]).rewards
        assert share == pytest.approx(expected[rank::3], abs=1e-5)
    assert reward.score([]).rewards == []
    assert torch.equal(torch.get_rng_state(), state)  # training's draws stay what they are


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_special_tokens_that_a_text_has_itself_are_not_put_twice(tmp_path: Path, name: str) -> None:
    """As in prompts that a chat template rendered before, with their end or without it."""
    model = made.MODELS[name](tmp_path)
    end = "</s>" if name == "bert" else ""
    rendered = [Sample(f"<s>{s.prompt}", s.completion + end * (n % 2), None)
                for n, s in enumerate(SAMPLES)]  # fmt: skip
    expected = [made.expected(model, ids) for ids in texts(SAMPLES, "<s>", "", end)]
    assert RewardModel(tmp_path, "cpu").score(rendered).rewards == pytest.approx(expected, abs=1e-5)
    long = Sample("<s>" + "".join(map(str, range(40))), " is it" + end, None)
    text = "".join(map(str, range(40))) + " is it"
    text = "<s>" + text[-(made.CONTEXT - 1 - bool(end)) :] + end
    found = RewardModel(tmp_path, "cpu").score([long]).rewards
    assert found == pytest.approx([made.expected(model, made.encode(text))], abs=1e-5)


def test_prompts_that_are_messages(tmp_path: Path) -> None:
    model = made.llama(tmp_path / "chat", template=made.TEMPLATE)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    samples = [Sample(messages, "so", None)]
    wanted = made.expected(model, made.encode("<s>s:be brief</s><s>u:why?</s><s>a:so</s>"))
    reward = RewardModel(tmp_path / "chat", "cpu")
    assert reward.score(samples).rewards == [pytest.approx(wanted, abs=1e-5)]
    made.llama(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain: .* no chat template, which prompts that are"):
        RewardModel(tmp_path / "plain", "cpu").score(samples)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_long_texts_are_scored_on_their_last_tokens(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = made.MODELS[name](tmp_path)
    long = Sample("".join(map(str, range(40))), " is it", None)
    last = 1 if name == "llama" else 2  # <s>, and </s>, stay
    text = (long.prompt + long.completion)[-(made.CONTEXT - last) :]
    wanted = made.expected(model, made.encode(f"<s>{text}" + "</s>" * (last - 1)))
    with caplog.at_level(logging.WARNING):
        found = RewardModel(tmp_path, "cpu").score([SAMPLES[1], long])
    assert found.rewards[1] == pytest.approx(wanted, abs=1e-5) and not found.failures
    assert "1 of 2 texts are longer than its 48 tokens and are scored on their last" in caplog.text


def test_failures_cost_their_sample_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = made.llama(tmp_path, template=made.TEMPLATE)
    row = made.encode("#")[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[row] = float("nan")
    model.save_pretrained(tmp_path)
    answers = ["fine", "a #", "well", "forbidden", "so", "# # #"]
    samples = [Sample("why", answer, None) for answer in answers]
    wanted = [
        made.expected(model, ids) for ids in texts(samples[::2], "<s>u:", "</s><s>a:", "</s>")
    ]
    with caplog.at_level(logging.WARNING):
        found = RewardModel(tmp_path, "cpu").score(samples)
    assert found.rewards[::2] == pytest.approx(wanted, abs=1e-5)
    assert found.rewards[1::2] == [None] * 3
    assert found.failures == Counter(raised=1, invalid=2)
    assert re.search(r"sample 3: .* refuses the messages \(not this\)", caplog.text)
    assert "sample 5: the score is nan, not a finite number" in caplog.text


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def headless(folder: Path) -> None:
    """The checkpoint of a language model whose configuration claims a reward."""
    import safetensors.torch

    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["score.weight"]
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD: dict[str, tuple[Any, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "language model": (
        lambda f: edit(f, architectures=["LlamaForCausalLM"]),
        "architecture LlamaForCausalLM; a reward model is one that ends in ForSequenceClass",
    ),
    "no architecture": (lambda f: edit(f, architectures=None), "names the architecture None"),
    "labels": (
        lambda f: made.llama(f, labels=3),
        "the model has 3 labels (LABEL_0, LABEL_1, LABEL_2), and a reward is one: name it with",
    ),
    "pickle": (pickled, "no weights in safetensors; other formats, which are pickles"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer; save the reward"),
    "no head": (headless, "the weights lack score.weight"),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"12345678"), "can't be loaded: "),
    "code": (
        lambda f: edit(f, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "can't be loaded: ",
    ),
    "other tokenizer": (
        lambda f: made.llama(f, vocab_size=200),
        "the tokenizer has ids up to 258, but the model embeds 200",
    ),
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('never') }}"),
        "refuses the messages (never)",
    ),
}


@pytest.mark.parametrize("spoil, sentence", BAD.values(), ids=BAD.keys())
def test_bad_checkpoints_are_one_sentence(tmp_path: Path, spoil: Any, sentence: str) -> None:
    made.llama(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        RewardModel(tmp_path, "cpu")
    message = str(caught.value)
    assert message.startswith(str(tmp_path)) and sentence in message and "\n" not in message


def test_without_a_folder_or_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="org/name: no such folder; a reward model is a local one"):
        RewardModel("org/name", "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="a reward model needs: pip install transformers"):
        RewardModel(tmp_path, "cpu")
