"""Chat templates from files and from this package, and which thoughts they are told to train."""

from pathlib import Path

_PACKAGED = Path(__file__).parent / "templates"
THOUGHTS = ("last", "all", "none")
_read_from: dict[str, str] = {}  # what sentences call a text that was read here


def template_text(name: str | None, thoughts: str | None = None) -> str:
    """The template of that name, told which turns' thoughts are trained on.

    Args:
        name: a file, one of the package's (`qwen3`), or a template's text itself, which has a {.
        thoughts: one of THOUGHTS, what the template knows as `thoughts`; None: its own default.

    Raises:
        ValueError: there is none, or it knows nothing of thoughts.
    """
    if name is None:
        raise ValueError(
            f"thoughts {thoughts} needs a chat template that tells thoughts apart: give "
            "--chat-template qwen3, or the file of your own."
        )
    packaged = {path.stem: path for path in _PACKAGED.glob("*.jinja")}
    path = Path(name) if "{" not in name else None
    if path is not None:
        path = path if path.is_file() else packaged.get(name)
        if path is None:
            raise ValueError(
                f"--chat-template {name}: no such file, and none of this package's templates "
                f"({', '.join(sorted(packaged))})."
            )
    try:
        text = name if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {name}: can't be read ({error}).") from None
    if thoughts is None:
        return _noted(text, path)
    if "thoughts" not in text:
        raise ValueError(
            f"the chat template reads no `thoughts`, so that {thoughts} would have no effect: give "
            "--chat-template qwen3, or one that does."
        )
    return _noted(f"{{%- set thoughts = '{thoughts}' -%}}\n{text}", path)


def read_from(text: str) -> str | None:
    """The file that a template's text was read from; None: it is a tokenizer's own, or was given
    as a text."""
    return _read_from.get(text)


def _noted(text: str, path: Path | None) -> str:
    if path is not None:
        _read_from[text] = str(path)
    return text
