"""Sums of two numbers, with answers that are written in one of two ways."""

import json
import random
from pathlib import Path

LARGEST = 19
Pair = tuple[int, int]


def sums(seed: int, largest: int = LARGEST) -> list[Pair]:
    """All pairs of numbers up to the largest, shuffled."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def examples(pairs: list[Pair], signed: float, seed: int, wrong: float = 0) -> list[dict[str, str]]:
    """Prompts such as "07+12=" with answers such as "19", or "+19" with a sign.

    Args:
        signed: share of the answers that have a sign.
        wrong: share of the answers that are wrong, by up to 9.
    """
    chance = random.Random(seed)
    lines = []
    for a, b in pairs:
        answer = a + b + (chance.randint(1, 9) if chance.random() < wrong else 0)
        sign = "+" if chance.random() < signed else ""
        lines.append({"prompt": f"{a:02}+{b:02}=", "answer": f"{sign}{answer:02}"})
    return lines


def write(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
