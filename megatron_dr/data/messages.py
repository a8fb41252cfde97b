"""Messages that can be trained on: whole in themselves, and shown by the chat template."""

import re
from collections.abc import Callable, Iterator
from typing import Any

Message = dict[str, Any]
Render = Callable[[list[Message], Any], str]

USUAL_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_CALLS = ("tool_calls", "function_call")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def checked(column: str, messages: Any) -> list[Message]:
    """The messages, without fields that are null.

    Raises:
        ValueError: what is no message, or has no content that can be trained on: its number and
            what is wrong with it.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} must be a list of messages, each with 'role' and 'content'.")
    found = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of {column!r}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where} must be an object with 'role' and 'content'.")
        message = {name: value for name, value in message.items() if value is not None}
        _check_content(f"{where} ({message['role']!r})", message)
        found.append(message)
    check_unicode(column, found)
    return found


def _check_content(where: str, message: Message) -> None:
    content = message.get("content")
    says_more = message["role"] == "assistant" and any(message.get(name) for name in _CALLS)
    if content is None and says_more:
        return
    if content is None:
        others = ", ".join(f"{name!r}" for name in message if name != "role") or "none"
        raise ValueError(f"{where} has no 'content' (its other fields: {others}).")
    if not isinstance(content, str | list):
        raise ValueError(
            f"{where}: its 'content' must be a string or a list of parts, and is "
            f"{type(content).__name__}."
        )
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get(_key(part)), str):
            kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else "no object"
            raise ValueError(
                f"{where}: a part of its 'content' is {kind} and has no text: give "
                '{"type": "text", "text": ...}.'
            )
    says_more |= any(message.get(name) for name in _THOUGHTS)
    blank = not any(text.strip() for _, text in _texts(content))
    if blank and message["role"] == "assistant" and not says_more:
        raise ValueError(f"{where} is empty.")


def _key(part: Message) -> str:
    """The field of a part of a content that has its text: named as its type."""
    kind = part.get("type", "text")
    return kind if isinstance(kind, str) else "text"


def _texts(content: Any) -> Iterator[tuple[int, str]]:
    """(number of the part, its text) of a content."""
    if isinstance(content, str):
        yield 0, content
    elif isinstance(content, list):
        yield from ((n, part[_key(part)]) for n, part in enumerate(content))


def text_of(message: Message) -> str:
    """Its content as one text; empty where it has none."""
    return "".join(text for _, text in _texts(message.get("content")))


def check_unicode(column: str, value: Any) -> None:
    """Refuse half of a surrogate pair, in any string of a value of JSON.

    Raises:
        ValueError: there is one.
    """
    left = [value]
    while left:
        held = left.pop()
        if isinstance(held, dict):
            left += [*held, *held.values()]
        elif isinstance(held, list):
            left += held
        elif isinstance(held, str):
            try:
                held.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{column!r} has half of a surrogate pair.") from None


def check_roles(messages: list[Message], template: str) -> None:
    """Refuse a role that is neither usual nor named by the template: it may be misspelt.

    Raises:
        ValueError: the first such role.
    """
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role in USUAL_ROLES or re.search(rf"(['\"]){re.escape(role)}\1", template):
            continue
        raise ValueError(
            f"message {number} has the role {role!r}, which the chat template does not name: "
            f"use one of {', '.join(USUAL_ROLES)}, or a template that names it."
        )


def check_rendered(messages: list[Message], tools: Any, text: str, render: Render) -> None:
    """Refuse messages and tools that the template leaves out of the text.

    What is added to each message must be in what is rendered then; one look at all of them first.

    Args:
        text: the messages rendered with the tools.

    Raises:
        ValueError: the first message that is left out, its calls, or the tools.
    """
    spots = [(n, part) for n, m in enumerate(messages) for part, _ in _texts(m.get("content"))]
    marks = {spot: f" zq{number}qz" for number, spot in enumerate(spots)}
    shown = _tried(render, _marked(messages, marks), tools) or ""
    for spot, mark in marks.items():
        if mark.strip() in shown:
            continue
        if _tried(render, _marked(messages, {spot: mark}), tools) == text:
            raise _left_out(messages, spot[0], "it")
    for n, message in enumerate(messages):
        for name in _CALLS:
            if message.get(name):
                without = {field: held for field, held in message.items() if field != name}
                others = [*messages[:n], {"content": ""} | without, *messages[n + 1 :]]
                if _tried(render, others, tools) == text:
                    raise _left_out(messages, n, f"its {name!r}")
    if tools and _tried(render, messages, None) == text:
        raise ValueError("the chat template does not render the tools: give one that does.")


def _left_out(messages: list[Message], n: int, what: str) -> ValueError:
    return ValueError(
        f"message {n + 1} ({messages[n]['role']}): the chat template does not render {what}: give "
        "a template that does, or leave the message out."
    )


def _marked(messages: list[Message], marks: dict[tuple[int, int], str]) -> list[Message]:
    """Copies with the marks added to the texts at (message, part)."""
    found = [dict(message) for message in messages]
    for (n, part), mark in marks.items():
        content = found[n]["content"]
        if isinstance(content, str):
            found[n]["content"] = content + mark
        else:
            held = dict(content[part])
            held[_key(held)] += mark
            found[n]["content"] = [*content[:part], held, *content[part + 1 :]]
    return found


def _tried(render: Render, messages: list[Message], tools: Any) -> str | None:
    """What is rendered; None where the template refuses: it has read what was changed."""
    try:
        return render(messages, tools)
    except ValueError:
        return None
