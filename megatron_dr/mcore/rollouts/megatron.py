"""Completions by the Megatron model under data, tensor and pipeline parallelism."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from megatron_dr.mcore import errors
from megatron_dr.mcore.collectives import of_all_ranks
from megatron_dr.mcore.compat import unwrap
from megatron_dr.mcore.rollouts.cache import CachedForward, share_from_last_stage
from megatron_dr.mcore.rollouts.ending import Ending
from megatron_dr.mcore.rollouts.state import evaluating, unsplit_sequence
from megatron_dr.mcore.rollouts.token_choice import choose, uniform
from megatron_dr.rl.rollouts import Completion, FinishReason, SamplingParams, sample_seed


@dataclass
class _Row:
    """A prompt and what follows it so far."""

    number: int  # of the prompt in the call
    prompt: list[int]
    limit: int  # tokens at most
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None

    def at(self, position: int) -> int:
        """The token at a position; of a finished row the last one, which nobody reads."""
        if position < len(self.prompt):
            return self.prompt[position]
        return self.tokens[min(position - len(self.prompt), len(self.tokens) - 1)]


class MegatronRollouts:
    """`Rollouts` by the policy that is being trained, between its training steps.

    A completion's log-probabilities are the policy's as training computes them, whatever the
    sampling: at temperature 1, without top-k and top-p, over the padded vocabulary, with the tokens
    that end a completion. In bfloat16 a cached pass rounds differently from training's; there take
    old log-probabilities from `log_probs`.

    Args:
        model: Megatron's list of model chunks.
        vocab_size: above the tokenizer's largest id; ids of the padded vocabulary are never chosen.
        stop_tokens: ids that end a completion, the end of document among them.
        decode: token ids to text; needed for stop strings.
        batch_size: prompts that one copy of the model continues at the same time.

    Raises:
        ValueError: if the layout has context or expert parallelism.
    """

    def __init__(
        self, model: Sequence[torch.nn.Module], vocab_size: int, stop_tokens: Collection[int] = (),
        decode: Callable[[list[int]], str] | None = None, batch_size: int = 64,
    ) -> None:  # fmt: skip
        check_layout()
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}.")
        self.model = list(model)
        self.vocab_size = vocab_size
        self.stop_tokens = stop_tokens
        self.decode = decode
        self.batch_size = batch_size
        self.context = int(unwrap(model[0]).max_sequence_length)  # type: ignore[arg-type]

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int,
        origins: Sequence[str] = (),
    ) -> list[Completion]:  # fmt: skip
        """One completion per prompt, the same list on every rank (collective).

        All ranks pass the same arguments. Copies of the model share the prompts among them. A
        token's draw is a function of seed, prompt's number and position, so that a layout of the
        model changes tokens only where rounding does (see `choose`).

        Args:
            prompts: token ids; repeat a prompt to get several completions.
            params: how to draw and where to stop; a completion also ends with the context.
            seed: another one in each call.
            origins: where each prompt is from ("prompts.jsonl line 7"), for error messages.

        Raises:
            ValueError: a prompt is empty, leaves no room in the context or has unknown ids.
            RuntimeError: the model's logits are not finite.
        """
        self._check(prompts, origins)
        ending = Ending(self.stop_tokens, params.stop, self.decode)
        rows = [
            _Row(n, list(p), min(params.max_tokens, self.context - len(p)))
            for n, p in enumerate(prompts)
        ]
        own = self._own_batches(rows)
        try:
            with errors.agreed(), evaluating(self.model), unsplit_sequence(self.model):
                for batch in own:
                    self._complete(batch, params, seed, ending)
        except ValueError as error:
            raise RuntimeError(str(error)) from error
        return _gather([row for batch in own for row in batch], len(rows))

    def _check(self, prompts: Sequence[Sequence[int]], origins: Sequence[str]) -> None:
        for number, prompt in enumerate(prompts):
            origin = f" ({origins[number]})" if origins else ""
            name = f"prompt {number + 1} of {len(prompts)}{origin}"
            if len(prompt) == 0:
                raise ValueError(f"{name} is empty: a completion needs a token to follow.")
            if len(prompt) >= self.context:
                raise ValueError(
                    f"{name} has {len(prompt)} tokens, but the model's context holds "
                    f"{self.context} and a completion needs at least one: shorten it or drop it."
                )
            if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
                raise ValueError(
                    f"{name} has token ids outside 0 to {self.vocab_size - 1}: it was made with "
                    "another tokenizer."
                )

    def _own_batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Batches of this copy of the model; prompts of a batch have similar lengths."""
        copies = parallel_state.get_data_parallel_world_size()
        size = max(1, min(self.batch_size, -(-len(rows) // copies)))
        ordered = sorted(rows, key=lambda row: len(row.prompt))
        batches = [ordered[first : first + size] for first in range(0, len(rows), size)]
        return batches[parallel_state.get_data_parallel_rank() :: copies]

    def _complete(
        self, rows: list[_Row], params: SamplingParams, seed: int, ending: Ending
    ) -> None:
        """Continue a batch: all rows stand at the same position, some still in their prompt."""
        length = max(len(row.prompt) + row.limit for row in rows)
        forward = CachedForward(self.model, len(rows), length)
        position = min(len(row.prompt) for row in rows)
        tokens = [row.prompt[:position] for row in rows]
        device = torch.cuda.current_device()
        while True:
            logits = forward(torch.tensor(tokens, device=device))
            writing = [
                n for n, row in enumerate(rows) if not row.finish and len(row.prompt) <= position
            ]
            if writing:
                policy = None if logits is None else logits[writing]
                self._extend([rows[n] for n in writing], policy, params, seed, ending)
            position += 1
            left = [n for n, row in enumerate(rows) if not row.finish]
            if not left:
                return
            if 2 * len(left) <= len(rows):
                rows = [rows[n] for n in left]
                forward.keep(left)
            tokens = [[row.at(position - 1)] for row in rows]

    def _extend(
        self, rows: list[_Row], logits: torch.Tensor | None, params: SamplingParams, seed: int,
        ending: Ending,
    ) -> None:  # fmt: skip
        """A token more for each row, chosen on one rank of the model's copy from logits [b, v]."""
        device = torch.cuda.current_device()
        chosen = torch.zeros(3, len(rows), dtype=torch.float64, device=device)
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            draws = [uniform(sample_seed(seed, r.number), r.number, len(r.tokens)) for r in rows]
            draw_b = torch.tensor(draws, dtype=torch.float64, device=device)
            known = self._allowed(logits[:, : self.vocab_size], rows, params.min_tokens)
            tokens = choose(known, draw_b, params.temperature, params.top_p, params.top_k)
            tokens = tokens.clamp(max=self.vocab_size - 1)  # beyond it where logits are NaN
            chosen[0] = tokens
            chosen[1] = logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
            ends = [
                ending.reached([*row.tokens[-ending.window :], token])
                for row, token in zip(rows, tokens.tolist(), strict=True)
            ]
            chosen[2] = torch.tensor(ends, dtype=torch.float64)
        share_from_last_stage(chosen)
        if not chosen[1].isfinite().all():
            raise ValueError("the model's logits are not finite, so no completion can be drawn.")
        for row, (token, log_prob, over) in zip(rows, chosen.T.tolist(), strict=True):
            row.tokens.append(int(token))
            row.log_probs.append(log_prob)
            if over:
                row.finish = "stop"
            elif len(row.tokens) == row.limit:
                row.finish = "length"

    def _allowed(self, logits: torch.Tensor, rows: list[_Row], min_tokens: int) -> torch.Tensor:
        """Logits [b, v], -inf for the tokens that would end a row too early."""
        short = [n for n, row in enumerate(rows) if len(row.tokens) < min_tokens]
        ends = [token for token in self.stop_tokens if token < self.vocab_size]
        if short and ends:
            logits = logits.clone()
            logits[torch.tensor(short)[:, None], torch.tensor(ends)] = -torch.inf
        return logits


def check_layout() -> None:
    """Raise ValueError where one forward pass would need tokens of several data ranks."""
    if parallel_state.get_context_parallel_world_size() > 1:
        raise ValueError(
            "rollouts and their log-probabilities do not run under context parallelism: set "
            "--context-parallel-size 1."
        )
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        raise ValueError(
            "rollouts and their log-probabilities do not run under expert parallelism: set "
            "--expert-model-parallel-size 1."
        )


def _gather(own: list[_Row], total: int) -> list[Completion]:
    """All copies' completions in the order of the prompts."""
    shares = of_all_ranks(own, parallel_state.get_data_parallel_group())
    rows = {row.number: row for share in shares for row in share}
    return [
        Completion(tuple(rows[n].tokens), tuple(rows[n].log_probs), rows[n].finish or "length")
        for n in range(total)
    ]
