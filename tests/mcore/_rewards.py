"""Reward functions of the tests, imported by reward workers."""

from typing import Any


def vowels(prompt: str, completion: str, answer: Any) -> float:
    """Something that differs between completions of an untrained model: a sum over its text."""
    return sum(ord(c) * (n + 3) for n, c in enumerate(completion)) % 97 / 97 + float(answer)


def equal(prompt: str, completion: str, answer: Any) -> float:
    return 0.5


def raises(prompt: str, completion: str, answer: Any) -> float:
    raise RuntimeError("no reward today")


def raises_sometimes(prompt: str, completion: str, answer: Any) -> float:
    if len(completion) % 2:
        raise RuntimeError("an odd completion")
    return float(len(set(completion)))


def wants(prompt: str, completion: str, answer: str) -> float:
    """How long the reference is; it raises where the record has an answer that is no text."""
    return float(len(answer + ""))
