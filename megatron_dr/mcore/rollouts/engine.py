"""Rollouts by another engine than the model itself, such as a vLLM server: `--dr-rl-engine`."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist

from megatron_dr.config.named import load_function
from megatron_dr.mcore import errors
from megatron_dr.mcore.data.vocabulary import largest_id
from megatron_dr.mcore.rollouts.megatron import MegatronRollouts, check_layout
from megatron_dr.rl.rollouts import Completion, Rollouts, SamplingParams


class Engine(Rollouts, Protocol):
    """What the named function gives; `generate` is called on rank 0 alone."""

    def load(self) -> None:
        """Bring the policy's present weights to the engine; called on every rank before a rollout.

        The policy is the `model` that the function was given.
        """


class EngineRollouts:
    """An engine's completions on every rank.

    Args:
        context: tokens that prompt and completion have together, at most.
        vocab_size: above the tokenizer's largest id.
    """

    def __init__(self, engine: Engine, context: int, vocab_size: int) -> None:
        self.engine, self.context, self.vocab_size = engine, context, vocab_size

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int,
        origins: Sequence[str] = (),
    ) -> list[Completion]:  # fmt: skip
        """One completion per prompt, the same list on every rank (collective).

        One that is longer than asked for, or than its prompt leaves room for, is cut.

        Raises:
            ValueError: the engine failed, or what it gave are no completions of the prompts.
        """
        self.engine.load()
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                answer[0] = self.engine.generate(prompts, params, seed)
                self._check(answer[0], len(prompts), params)
            except Exception as error:  # the others wait for an answer
                answer[1] = f"{type(error).__name__}: {error}"
        dist.broadcast_object_list(answer, 0)
        completions, failure = answer
        if failure is not None:
            raise ValueError(f"--dr-rl-engine failed on rank 0: {failure}")
        rooms = [min(params.max_tokens, self.context - len(prompt)) for prompt in prompts]
        return [
            c if len(c.ids) <= room else Completion(c.ids[:room], c.log_probs[:room], "length")
            for c, room in zip(completions, rooms, strict=True)
        ]

    def _check(
        self, completions: Sequence[Completion], wanted: int, params: SamplingParams
    ) -> None:
        if len(completions) != wanted:
            raise ValueError(f"{len(completions)} completions of {wanted} prompts.")
        for number, completion in enumerate(completions):
            if not all(0 <= i < self.vocab_size for i in completion.ids):
                raise ValueError(
                    f"completion {number} has ids outside of the vocabulary of {self.vocab_size}: "
                    "the engine has another tokenizer."
                )
            if completion.finish_reason == "stop" and len(completion.ids) <= params.min_tokens:
                raise ValueError(
                    f"completion {number} ends after {len(completion.ids)} tokens, its end among "
                    f"them, before the {params.min_tokens} asked for: the engine does not keep "
                    "min_tokens."
                )


def open_rollouts(
    model: list[Any], tokenizer: Any, args: Namespace, engine: str | None
) -> MegatronRollouts | EngineRollouts:
    """By the model itself, or by the engine that `engine`, module:function, gives (collective).

    Raises:
        ValueError: a layout in which rollouts don't run, or a function that can't be loaded.
    """
    size = largest_id(tokenizer) + 1  # where ids have gaps, more than there are words
    if engine is None:
        own = MegatronRollouts(model, size, [tokenizer.eod], tokenizer.detokenize)
        own.context = min(own.context, args.seq_length)
        return own
    check_layout()  # training's own log-probabilities are found as rollouts are
    with errors.agreed():
        function = load_function("--dr-rl-engine", engine)
    return EngineRollouts(function(model, args), args.seq_length, size)
