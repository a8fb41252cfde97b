"""Scores of an answer against a reference: exact match, F1 and ROUGE-L, from 0 to 1.

Exact match and F1 are SQuAD's (Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine
Comprehension of Text", EMNLP 2016, and the evaluation script of version 2): both texts in lower
case, without ASCII punctuation and the articles a, an and the, words apart by one blank.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from megatron_dr.config.rl import RLConfig
from megatron_dr.rl.reward_pool import RewardPool

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """What SQuAD compares of a text."""
    plain = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(plain.split())


def exact(answer: str, reference: str) -> float:
    """1 if both are the same, normalised."""
    return float(normalised(answer) == normalised(reference))


def f1(answer: str, reference: str) -> float:
    """2 c / (n + m): c words in common of n and m, each as often as both have it.

    Where one has no words it is 1 if the other has none either, else 0.
    """
    found, wanted = normalised(answer).split(), normalised(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    return 2 * (Counter(found) & Counter(wanted)).total() / (len(found) + len(wanted))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004): the F-measure
    of the longest common subsequence of words, by the package rouge-score, without stemming.

    Words are letters and digits in lower case. Of ASCII text they are those of the package's own
    tokenizer; that one drops the letters of all other alphabets, this one keeps them.
    """
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


class _Words:
    """A tokenizer as rouge-score calls it."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "f1": f1, "rouge_l": rouge_l}


def open_reward(name: str) -> RewardPool:
    """A process that scores by a reward function, module:function, as in training by rewards.

    Raises:
        ValueError: it can't be loaded or used here.
    """
    return RewardPool(name, RLConfig.reward_workers, RLConfig.reward_timeout)


def check_rewards(names: Sequence[str]) -> None:
    """Load each reward among these metrics once: tells a wrong name now, not at a run's end.

    Raises:
        ValueError: as `open_reward`.
    """
    for name in names:
        if name not in METRICS:
            open_reward(name).close()


def parse(flag: str, text: str) -> tuple[str, ...]:
    """The metrics of a list with commas: of `METRICS`, or a reward function, module:function.

    Raises:
        ValueError: one that there is not, one given twice, or a package that is not installed.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = f"{', '.join(METRICS)}, or a reward as module:function"
    if not names:
        raise ValueError(f"{flag} is empty: give, with commas, {known}.")
    for name in names:
        if name not in METRICS and not re.fullmatch(r"[^:]+:[^:]+", name):
            raise ValueError(f"{flag} {name}: no such metric; give, with commas, {known}.")
        if names.count(name) > 1:
            raise ValueError(f"{flag} has {name} twice: name it once.")
    if "rouge_l" in names and find_spec("rouge_score") is None:
        raise ValueError(
            f"{flag} rouge_l needs the package rouge-score: pip install 'megatron_dr[metrics]', or "
            "leave that metric out."
        )
    return names
