"""Loads a reward model: a Hugging Face sequence-classification checkpoint.

Only a local folder is read, weights only as safetensors, and no code of the folder runs.
"""

from pathlib import Path
from typing import Any

_HEAD = "ForSequenceClassification"
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")


def load(folder: Path, label: str | None) -> tuple[Any, Any, int]:
    """transformers' model, for evaluation and on the host, its tokenizer, and the label's number.

    Args:
        label: name or number of the one whose logit is the reward; None: the only one.

    Raises:
        ValueError: transformers is not installed, or what is wrong with the folder.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("a reward model needs: pip install transformers") from error
    _check_files(folder)
    # each rank would print one
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = _loaded(folder, transformers.AutoConfig)
    _check_config(folder, config)
    number = _label(folder, config, label)
    tokenizer = _loaded(folder, transformers.AutoTokenizer)
    model, report = _loaded(
        folder, transformers.AutoModelForSequenceClassification, config=config,
        use_safetensors=True, output_loading_info=True,
    )  # fmt: skip
    if report["missing_keys"]:
        raise ValueError(f"{folder}: the weights lack {', '.join(sorted(report['missing_keys']))}.")
    _check_vocabulary(folder, model, tokenizer)
    return model.eval().requires_grad_(False), tokenizer, number


def first_line(error: Exception) -> str:
    """An error of a library as the end of a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _loaded(folder: Path, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ValueError(f"{folder} can't be loaded: {first_line(error)}") from error


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a reward model is a local one.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so it is no Hugging Face checkpoint.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: no weights in safetensors; other formats, which are pickles, are not read."
        )
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise ValueError(f"{folder}: no tokenizer; save the reward model's own into the folder.")


def _check_config(folder: Path, config: Any) -> None:
    named = config.architectures or []
    if not named or not all(name.endswith(_HEAD) for name in named):
        raise ValueError(
            f"{folder}: config.json names the architecture {', '.join(named) or None}; a reward "
            f"model is one that ends in {_HEAD}."
        )


def _label(folder: Path, config: Any, label: str | None) -> int:
    """The number of the label whose logit is the reward."""
    names = [str(config.id2label[number]) for number in range(config.num_labels)]
    known = f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
    if label is None:
        if len(names) == 1:
            return 0
        raise ValueError(
            f"{folder}: the model has {len(names)} labels ({known}), and a reward is one: name it "
            "with --dr-rl-reward-label."
        )
    if names.count(label) == 1:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    raise ValueError(
        f"{folder}: --dr-rl-reward-label {label} is none of the model's labels ({known}), nor a "
        f"number below {len(names)}."
    )


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    """Ids without an embedding would stop the run in its middle; padding has none of its own."""
    rows = model.get_input_embeddings().num_embeddings
    ids = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    if ids and max(ids) >= rows:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {max(ids)}, but the model embeds {rows}: "
            "the tokenizer is another model's."
        )
