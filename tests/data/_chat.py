"""Small tokenizers with chat templates of the usual kinds, made on the spot."""

from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# the generation prompt adds nothing, answers begin with a space, as in Llama 2
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# earlier answers lose their thoughts, as in Qwen 3: no prefix of the whole
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = ["Hello there, how are you?\n\nI am well.\n", " the and of an answer\n\n assistant user"]


@cache
def bpe() -> Tokenizer:
    """A byte-level BPE that has learned merges, also of line ends."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 10, trainer)
    return tokenizer


def fast(template: str | None) -> Any:
    """The BPE as a tokenizer of transformers."""
    end = "</s>" if template == INSTRUCT else "<|im_end|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe(), eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


def trimming(template: str | None, bos: bool = False) -> Any:
    """The same, with a post-processor that trims places, as is its default, and may add a BOS."""
    tokenizer = fast(template)
    steps: list[Any] = [ByteLevel(trim_offsets=True)]
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        special = [("<s>", tokenizer.bos_token_id)]
        steps.append(TemplateProcessing(single="<s> $A", special_tokens=special))
    tokenizer.backend_tokenizer.post_processor = Sequence(steps)
    return tokenizer


def spaced(kind: str) -> Any:
    """A BPE that begins a text with a space, as Llama 2's does: `first`, `always` or `legacy`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # no token of two words
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    words = ["The cat sat: the answer is four.\n", " Answer: Question: the cat\n"]
    tokenizer.train_from_iterator(words * 10, trainer)
    if kind == "legacy":
        tokenizer.pre_tokenizer = None
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(marks)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    steps = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")


def saved(folder: Path, template: str | None = CHATML) -> str:
    """A folder with this tokenizer."""
    fast(template).save_pretrained(folder)
    return str(folder)


def sentencepiece_model(folder: Path) -> str:
    """A sentencepiece model file."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_prefix=str(folder / "small"),
        vocab_size=285,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return str(folder / "small.model")
