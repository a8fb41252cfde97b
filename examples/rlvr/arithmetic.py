"""Sums of two numbers as prompts with answers, right ones and wrong ones; seeded."""

import json
import random
from pathlib import Path

LARGEST = 19


def sums(seed: int) -> list[tuple[int, int]]:
    """All pairs of numbers up to LARGEST, shuffled."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def examples(pairs: list[tuple[int, int]], wrong: float, seed: int) -> list[dict[str, str]]:
    """Prompts such as "07+12=" with answers, of which a share is too large by one."""
    chance = random.Random(seed)
    lines = []
    for a, b in pairs:
        answer = a + b + (chance.random() < wrong)
        lines.append({"prompt": f"{a:02}+{b:02}=", "answer": f"{answer:02}"})
    return lines


def write(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
