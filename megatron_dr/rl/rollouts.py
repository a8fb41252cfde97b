"""Rollouts: what samples completions for the training loop, whatever engine does it."""

import hashlib
import numbers
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_dr.rl.finite import finite

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    Args:
        max_tokens: of a completion, above 0.
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens of this total probability, in (0, 1].
        stop: texts that end a completion.
        top_k: sample among so many of the likeliest tokens, before top_p; 0: among all.
        min_tokens: of a completion, before the token that ends it; 0: it may be that alone.

    Raises:
        ValueError: one is out of its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_k: int = 0
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be above 0, not {self.max_tokens}.")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, not {self.top_k}.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"min_tokens must be from 0 to max_tokens {self.max_tokens}, not {self.min_tokens}."
            )
        if self.min_tokens and self.stop:
            raise ValueError(
                "min_tokens keeps tokens from being sampled, and can't keep a text of stop: "
                "drop one of them."
            )


@dataclass(frozen=True)
class Completion:
    """A sampled completion.

    Attributes:
        ids: its tokens, the end token included where the model produced one.
        log_probs: natural logarithms of the sampled tokens' probabilities, one for each id.
        finish_reason: `stop` at an end token or a stop text, `length` where max_tokens cut it.

    Raises:
        ValueError: not one log-probability for each id; an id that is no integer from 0; a
            log-probability that is not finite or above 0.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.log_probs):
            raise ValueError(
                f"a completion has {len(self.ids)} tokens but {len(self.log_probs)} "
                "log-probabilities."
            )
        for token in self.ids:
            known = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            if not known or not 0 <= token < 2**31:
                raise ValueError(
                    f"a completion's ids are integers from 0, not {reprlib.repr(token)}."
                )
        for value in self.log_probs:
            found = None if isinstance(value, bool) else finite(value)
            if found is None or found > 0:
                raise ValueError(
                    "a completion's log-probabilities are finite and at most 0, not "
                    f"{reprlib.repr(value)}."
                )


class Rollouts(Protocol):
    """Samples one completion for each prompt; for a group, repeat its prompt."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[Completion]:
        """Completions in the prompts' order.

        Args:
            prompts: token ids.
            seed: prompt i is sampled with `sample_seed(seed, i)`: the same call gives the same
                completions, and equal prompts of one call different ones.

        Raises:
            ValueError: a prompt is empty or leaves no room in the context.
            RuntimeError: the engine failed.
        """


def sample_seed(seed: int, number: int) -> int:
    """Seed of one sample, from 0 to 2^31 - 1; no two samples of a run share one but by chance."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
