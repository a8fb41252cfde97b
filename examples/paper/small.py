"""Tiny data in the formats of the authors' files, and a tiny reward model: for the small forms.

Texts are those of the other examples: Bible verses in six languages (SFT), reviews (RLHF), sums
(RLVR). What the base model is taught lies beside the data, in base.jsonl.
"""

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import prepare

EXAMPLES = Path(__file__).resolve().parents[1]
VERSES = EXAMPLES / "sft" / "data"
sys.path += [str(EXAMPLES / "rlhf"), str(EXAMPLES / "rlvr")]

import reviews  # noqa: E402


def sft(out: Path, wanted: Mapping[str, Any]) -> Path:
    """Alpaca's and SAMSum's places: verses of many languages, and Spanish ones."""
    sizes = {"pretrain": 2000, "general": 300, "target": 24, "target_heldout": 64}
    verses = {
        name: [json.loads(line)["text"]
               for line in (VERSES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in sizes
    }  # fmt: skip
    general = verses["general"][:: len(verses["general"]) // sizes["general"]]
    for key, texts in (("general", general), ("target", verses["target"]),
                       ("held_out", verses["target_heldout"])):  # fmt: skip
        records = [{"dataset": key, "id": f"{key}_{n}", **_asked("Write.", text)}
                   for n, text in enumerate(texts)]  # fmt: skip
        prepare.write(out / wanted[key], records)
    taught = [_asked("Write.", text) for text in verses["pretrain"][: sizes["pretrain"]]]
    return prepare.write(out / "base.jsonl", taught)


def rlhf(out: Path, wanted: Mapping[str, Any]) -> Path:
    """RealToxicityPrompts' place: the beginnings of reviews, and how the rater liked them."""
    chance = random.Random(0)
    records, taught = [], []
    for noun, kind in reviews.nouns(0) * 4:
        begun, ending = f"The {noun} was", reviews.completion(kind, chance)
        records.append({
            "filename": "reviews.txt", "begin": 0, "end": len(begun), "challenging": False,
            "prompt": {"text": begun, "toxicity": chance.random()},
            "continuation": {"text": ending, "toxicity": chance.random()},
        })  # fmt: skip
        taught.append({"text": begun + reviews.completion(kind, chance)})
    prepare.write(out / wanted["prompts"], records)
    return prepare.write(out / "base.jsonl", taught)


def rlvr(out: Path, wanted: Mapping[str, Any]) -> Path:
    """verl's MATH's place: sums of two digits, with their answers in a box."""
    import pyarrow
    import pyarrow.parquet

    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    for name, split, chosen in (("general", "train", pairs[:80]), ("held_out", "test", pairs[80:])):
        rows = [{
            "data_source": "sums", "prompt": _asked(f"{a}+{b} in \\boxed{{}}", "")["messages"][:1],
            "ability": "math", "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": split, "index": n},
        } for n, (a, b) in enumerate(chosen)]  # fmt: skip
        path = out / wanted[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    chance, taught = random.Random(1), []
    for a, b in pairs * 20:  # half of the answers are wrong
        answer = a + b + (chance.randint(1, 4) if chance.random() < 0.5 else 0)
        taught.append(_asked(f"{a}+{b} in \\boxed{{}}", f"\\boxed{{{answer}}}"))
    return prepare.write(out / "base.jsonl", taught)


MAKE: Mapping[str, Callable[..., Path]] = {"sft": sft, "rlhf": rlhf, "rlvr": rlvr}


def _asked(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


def reward_model(folder: Path, steps: int = 150) -> Path:
    """A RoBERTa of two labels, nothate and hate, that tells praise from blame."""
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = _bytes_between_marks()
    labels = {0: "nothate", 1: "hate"}
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        id2label=labels, label2id={name: number for number, name in labels.items()},
    ))  # fmt: skip
    optimizer, chance = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(0)
    words = [[w for kind in of.values() for w in kind] for of in (reviews.PRAISE, reviews.BLAME)]
    for _ in range(steps):
        kinds = [chance.randrange(2) for _ in range(32)]
        texts = [" " + " and ".join(chance.choices(words[k], k=chance.randint(1, 3))) + "."
                 for k in kinds]  # fmt: skip
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        optimizer.zero_grad()
        model(**batch, labels=torch.tensor(kinds)).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _bytes_between_marks() -> Any:
    """A tokenizer of bytes, with <s> before a text and </s> after it."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=62,
    )  # fmt: skip
