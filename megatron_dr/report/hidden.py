"""Leaves secrets out of what is written down or said.

A flag's value is left out where the flag's name says that it is one, and of a URL the user, the
password and the query; of any text what looks like a key.
"""

import re
from collections.abc import Sequence

HIDDEN = "(left out)"
_NAMED = re.compile(r"key|token|secret|passw|pwd|credential|auth", re.I)
_HARMLESS = re.compile(
    r"tokenizer|tokens(?=$|-)|per-token|token-d(?=ispatcher|rop)", re.I
)  # names of Megatron's and ours
# a password may have an @: the user goes to the last one before the path
_URL = re.compile(r"(\w[\w+.-]*://)(?:[^/\s?#]*@)?([^\s?#]*)[^\s]*")
_VALUE = r"\"[^\"]*\"?|'[^']*'?|[^\s\"',;&}]+"  # quoted, to the closing quote or the end
_INSIDE = re.compile(
    r"((?:key|token|secret|passw\w*|pwd|credential\w*|authorization|bearer)[\"']?\s*[:=]\s*"
    rf"(?:(?:bearer|basic|token)\s+)?|bearer\s+)({_VALUE})",
    re.I,
)
_KNOWN = re.compile(
    r"\b(?:sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|nvapi-|AKIA|AIza|eyJ[\w-]+\.)"
    r"[\w.-]{8,}"
)
_MOST = 1 << 16  # characters that are looked at; a message has far fewer


def flags(words: Sequence[str]) -> list[list[str]]:
    """[[flag, its values], ...] of a command line, without secrets."""
    found: list[list[str]] = []
    for word in words:
        waits = found and len(found[-1]) == 1 and is_named(found[-1][0])  # a key may begin with -
        if re.match(r"--[A-Za-z]" if waits else r"--?[A-Za-z]", word):
            name, equals, value = word.partition("=")
            found.append([name, *([value] if equals else [])])
        elif found:
            found[-1].append(word)
        else:
            found.append(["", word])
    return [[name, _value(name, values)] for name, *values in found]


def _value(name: str, values: Sequence[str]) -> str:
    said = " ".join(values)
    is_number = all(re.fullmatch(r"[\d.,]+", value) for value in values)
    if said and (is_named(name) or "tokens" in name and not is_number):
        return HIDDEN
    return without_secrets(said)


def without_secrets(text: str) -> str:
    """A value with what looks like a key or password taken out."""
    text = _URL.sub(r"\1\2", text)
    return _KNOWN.sub(HIDDEN, _INSIDE.sub(rf"\1{HIDDEN}", text))


def holds_key(text: str) -> bool:
    """Whether a line of a script has what looks like a key; one that is read from a variable or a
    file is none."""
    inside = (found[2].strip("\"'") for found in _INSIDE.finditer(text))
    return bool(_KNOWN.search(text)) or not all(value[:1] in "$`" for value in inside)


def is_named(name: str) -> bool:
    """Whether a name says that its value is a secret."""
    return _NAMED.search(_HARMLESS.sub("", name)) is not None


SENTENCES = (ImportError, AttributeError, ValueError, RuntimeError)  # their texts stand alone


def error(found: BaseException, most: int = 500, bare: tuple[type[Exception], ...] = ()) -> str:
    """An error of code that others wrote, as `shown`: its kind and its text.

    Args:
        bare: kinds whose text is said without them.
    """
    kind = type(found).__name__
    try:
        text = str(found)
    except Exception:  # the text is their code, too
        text = ""
    if not text or not isinstance(found, bare):
        text = f"{kind}: {text}" if text else kind
    return shown(text, most)


def shown(text: str, most: int = 500) -> str:
    """What others wrote, for a message: without secrets, cut, and with the signs that a terminal
    would obey, or that would begin a line, written out."""
    cut = without_secrets(text[:_MOST])[:most]
    return "".join(s if s.isprintable() else s.encode("unicode_escape").decode() for s in cut)
