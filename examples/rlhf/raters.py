"""A reward model from the raters' choices: a small transformers checkpoint that scores a text."""

import random
from pathlib import Path

import reviews
import torch
import transformers
from torch.nn.functional import logsigmoid

STEPS, PAIRS, FRESH = 400, 32, 1024


def train(nouns: list[reviews.Noun], tokenizer_folder: Path, out: Path) -> float:
    """Write the checkpoint; the share of fresh pairs that it ranks as the raters do.

    Its loss is Bradley and Terry's, -log sigmoid(score of the better - score of the worse).
    """
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=128, num_labels=1,
            pad_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    chance = random.Random(0)
    for step in range(STEPS + 1):
        pairs = [_pair(nouns, chance) for _ in range(PAIRS if step < STEPS else FRESH)]
        batch = tokenizer([text for pair in pairs for text in pair], padding=True,
                          padding_side="right", return_tensors="pt")  # fmt: skip
        better, worse = model(**batch).logits.view(-1, 2).T
        if step < STEPS:
            optimizer.zero_grad()
            (-logsigmoid(better - worse).mean()).backward()
            optimizer.step()
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / STEPS)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return float((better > worse).float().mean())


def _pair(nouns: list[reviews.Noun], chance: random.Random) -> tuple[str, str]:
    """(better, worse) by the raters."""
    while True:
        noun, kind = noun_kind = chance.choice(nouns)
        one, other = (reviews.completion(kind, chance) for _ in range(2))
        a, b = reviews.liked(one, kind), reviews.liked(other, kind)
        if a != b:
            text = reviews.prompt(noun_kind)["prompt"]
            return (text + one, text + other) if a > b else (text + other, text + one)
