"""A reward model with two labels: one of its logits is the reward, of the completion alone."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from megatron_dr.config.rl import RLConfig  # noqa: E402
from megatron_dr.rl.advantages import normalised  # noqa: E402
from megatron_dr.rl.losses import gradient_loss  # noqa: E402
from megatron_dr.rl.reward_model import RewardModel  # noqa: E402
from megatron_dr.rl.reward_pool import Sample  # noqa: E402
from megatron_dr.rl.weights import token_weights  # noqa: E402

from . import _reward_model as made  # noqa: E402

COMPLETIONS = [" so it is.", "", " you fool", " and then he went home again"]
SAMPLES = [Sample(f"prompt {n}", text, None) for n, text in enumerate(COMPLETIONS)]


def close(found: list[float | None], wanted: list[float]) -> None:
    assert found == pytest.approx(wanted, abs=1e-5)


def test_the_reward_is_the_labels_logit_by_hand(tmp_path: Path) -> None:
    model = made.roberta(tmp_path)
    by_hand = [made.logits(model, made.encode(f"<s>{text}</s>")) for text in COMPLETIONS]
    assert all(abs(good - bad) > 1e-3 for good, bad in by_hand)
    for label, number in (("nothate", 0), ("hate", 1), ("0", 0), ("1", 1)):
        found = RewardModel(tmp_path, "cpu", label, "completion").score(SAMPLES)
        close(found.rewards, [pair[number] for pair in by_hand])
    whole = [made.logits(model, made.encode(f"<s>{s.prompt}{s.completion}</s>")) for s in SAMPLES]
    close(RewardModel(tmp_path, "cpu", "nothate").score(SAMPLES).rewards, [x for x, _ in whole])
    # and the target's loss of these rewards: (3, 1, 1, 2) tokens, all with probability 1/2
    reward = torch.tensor([good for good, _ in by_hand], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0]])
    log_prob = torch.full((4, 3), 0.5, dtype=torch.float64).log()
    total, count = gradient_loss(
        log_prob, normalised(reward)[:, None], token_weights(mask, "token")
    )
    numbers = reward.tolist()
    mean = sum(numbers) / 4
    deviation = (sum((x - mean) ** 2 for x in numbers) / 3) ** 0.5 + 1e-4
    terms = [
        (x - mean) / deviation * tokens for x, tokens in zip(numbers, (3, 1, 1, 2), strict=True)
    ]
    assert count == 7
    assert float(total) == pytest.approx(0.6931471805599453 * sum(terms), abs=1e-5)


def test_a_completion_alone_needs_no_template(tmp_path: Path) -> None:
    """Also of prompts that are messages, and where the tokenizer has a template."""
    messages = Sample([{"role": "user", "content": "why?"}], " so", None)
    plain = made.roberta(tmp_path / "plain")
    found = RewardModel(tmp_path / "plain", "cpu", "hate", "completion").score([messages])
    close(found.rewards, [made.logits(plain, made.encode("<s> so</s>"))[1]])
    chat = made.llama(tmp_path / "chat", template=made.TEMPLATE)
    found = RewardModel(tmp_path / "chat", "cpu", text="completion").score([messages])
    close(found.rewards, [made.expected(chat, made.encode("<s> so"))])


@pytest.mark.parametrize("longest", [None, 20])
def test_positions_behind_that_of_padding_are_counted(tmp_path: Path, longest: int | None) -> None:
    """A tokenizer that doesn't know the context must not let a text run over it."""
    model = made.roberta(tmp_path, longest)
    room = (longest or made.CONTEXT - 1) - 2
    text = "".join(map(str, range(40)))
    found = RewardModel(tmp_path, "cpu", "hate", "completion").score([Sample("", text, None)])
    close(found.rewards, [made.logits(model, made.encode(f"<s>{text[-room:]}</s>"))[1]])


WRONG: list[tuple[str | None, str]] = [
    (None, "has 2 labels (nothate, hate), and a reward is one: name it with --dr-rl-reward-label."),
    ("toxic", "--dr-rl-reward-label toxic is none of the model's labels (nothate, hate), nor a nu"),
    ("2", "--dr-rl-reward-label 2 is none of the model's labels"),
]


@pytest.mark.parametrize("label, sentence", WRONG)
def test_another_label_is_refused(tmp_path: Path, label: str | None, sentence: str) -> None:
    made.roberta(tmp_path)
    with pytest.raises(ValueError) as caught:
        RewardModel(tmp_path, "cpu", label)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [{"reward_label": "hate"}, {"reward_text": "completion"}])
def test_its_flags_are_of_a_reward_model(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is of a reward model, and --dr-rl-reward is a function"):
        RLConfig(reward="a:b", **more)
    assert RLConfig(reward_model="folder", **more)
