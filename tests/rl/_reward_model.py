"""Tiny random reward models as Hugging Face checkpoints, and their scores, one text at a time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

CONTEXT = 48
SPECIAL = ["<pad>", "<s>", "</s>"]
TEMPLATE = (
    "{% for m in messages %}{% if 'forbidden' in m.content %}{{ raise_exception('not this') }}"
    "{% endif %}<s>{{ m.role[0] }}:{{ m.content }}</s>{% endfor %}"
)
SIZES = dict(
    vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
)  # fmt: skip


def tokenizer(enclose: bool, template: str | None = None) -> Any:
    """One token a byte, behind <s>; if asked, between <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if enclose else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def llama(folder: Path, template: str | None = None, labels: int = 1, **config: Any) -> Any:
    """A decoder, which scores its last token; by default its configuration knows no padding."""
    torch.manual_seed(1)
    chosen = {"num_labels": labels, "pad_token_id": None} | config
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES | chosen)
    ).eval()
    torch.nn.init.normal_(model.score.weight)
    return _save(folder, model, tokenizer(False, template))


def bert(folder: Path) -> Any:
    """An encoder, which scores its first token."""
    torch.manual_seed(2)
    about = transformers.BertConfig(**SIZES, num_labels=1)
    return _save(folder, transformers.BertForSequenceClassification(about).eval(), tokenizer(True))


def roberta(folder: Path, longest: int | None = None) -> Any:
    """An encoder with two labels, as classifiers of toxic texts have."""
    torch.manual_seed(3)
    about = transformers.RobertaConfig(
        **SIZES, pad_token_id=0, id2label={0: "nothate", 1: "hate"},
        label2id={"nothate": 0, "hate": 1},
    )  # fmt: skip
    own = tokenizer(True)
    if longest is not None:
        own.model_max_length = longest
    return _save(folder, transformers.RobertaForSequenceClassification(about).eval(), own)


def _save(folder: Path, model: Any, saved: Any) -> Any:
    model.save_pretrained(folder)
    saved.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> list[float]:
    """RoBERTa's logits of one text, from its last hidden state by its head's own matrices."""
    hidden = model.roberta(torch.tensor([ids])).last_hidden_state[0, 0]
    head = model.classifier
    middle = (head.dense.weight @ hidden + head.dense.bias).tanh()
    found: list[float] = (head.out_proj.weight @ middle + head.out_proj.bias).tolist()
    return found


@torch.no_grad()
def expected(model: Any, ids: list[int]) -> float:
    """The score of one text, without padding, masks or batches."""
    row = torch.tensor([ids])
    if isinstance(model, transformers.BertForSequenceClassification):
        return float(model.classifier(model.bert(row).pooler_output))
    return float(model.score(model.model(row).last_hidden_state[:, -1]))


def encode(text: str) -> list[int]:
    """Token ids of a text in which <s> and </s> stand where they are meant."""
    ids: list[int] = tokenizer(False)(text, add_special_tokens=False)["input_ids"]
    return ids


MODELS: dict[str, Callable[..., Any]] = {"llama": llama, "bert": bert}
