"""Rewards by a reward model: one logit of a Hugging Face sequence-classification checkpoint.

Shape suffixes: N samples, B samples of a batch, T tokens, L labels.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_dr.data.rendering import Templates
from megatron_dr.rl.reward_checkpoint import first_line, load
from megatron_dr.rl.reward_pool import Sample, Scores

_log = logging.getLogger(__name__)
_TRIAL = Sample("What is one and one?", "Two.", None)


class RewardModel:
    """Scores batches with a reward model; what a `RewardPool` is for functions.

    Its input is the prompt (messages, or a text as a user's turn) and an assistant's turn, the
    completion, by the tokenizer's chat template. Without a template it is prompt and completion as
    one text, with the special tokens that the tokenizer puts around texts; those that the text has
    there itself, as one rendered by a template, are not put twice. With `text` completion it is the
    completion as such a text, whatever the template. A text longer than the model's
    context is scored on its last tokens, and counted in a warning. Rows are right-padded and
    masked, so that a score depends neither on the padding nor on the batch, but for rounding.

    A sample on which the template raises, or whose score is not a finite number, has no reward; it
    is logged and counted.

    Args:
        folder: config.json, safetensors and the tokenizer (see `reward_checkpoint`).
        device: keeps the whole model, in the checkpoint's dtype.
        label: whose logit is the reward, by name or number; of a model with one label None.
        text: what it reads; a classifier of texts reads the completion.
        batch_size: samples in a forward pass.

    Raises:
        ValueError: the folder is no such checkpoint, in one sentence.
    """

    def __init__(
        self, folder: str | Path, device: torch.device | int | str, label: str | None = None,
        text: Literal["whole", "completion"] = "whole", batch_size: int = 8,
    ) -> None:  # fmt: skip
        self._folder, self._device, self._batch_size = Path(folder), device, batch_size
        self._model, self._tokenizer, self._label = load(self._folder, label)
        self._whole = text == "whole"
        templated = self._whole and self._tokenizer.chat_template is not None
        self._templates = Templates(self._tokenizer) if templated else None
        self._model.to(device)
        self._config = self._model.config.get_text_config()
        self._config.use_cache = False
        # the id by which the model itself tells padding; None where it knows none that it embeds
        pad, embedded = self._config.pad_token_id, self._model.get_input_embeddings().num_embeddings
        self._pad = pad if pad is not None and 0 <= pad < embedded else None
        self._context = _context(self._model, self._config, self._tokenizer)
        self._around: tuple[list[int], list[int]] = [], []
        try:
            if not templated:  # a template would write special tokens itself
                self._around = _around(self._tokenizer)
            self._forward([self._text(_TRIAL)])
        except Exception as error:  # templates and models raise what they like
            raise ValueError(
                f"{self._folder}: this reward model can't score a text: {first_line(error)}"
            ) from error

    def score(self, samples: Sequence[Sample]) -> Scores:
        """Rewards of a batch; failures are of the kinds `raised` and `invalid` (not finite).

        Raises:
            ValueError: a prompt is messages, and the tokenizer has no chat template.
        """
        texts_alone = self._whole and self._templates is None
        if texts_alone and not all(isinstance(sample.prompt, str) for sample in samples):
            raise ValueError(
                f"{self._folder}: the reward model's tokenizer has no chat template, which "
                "prompts that are messages need."
            )
        rewards: list[float | None] = [None] * len(samples)
        failures: Counter[str] = Counter()
        texts: dict[int, str] = {}
        for number, sample in enumerate(samples):
            try:
                texts[number] = self._text(sample)
            except Exception as error:  # a template refuses what it likes
                failures["raised"] += 1
                self._warn(sample.named(number), first_line(error))
        reward_N = self._forward(list(texts.values()))
        for number, reward, finite in zip(
            texts, reward_N.tolist(), reward_N.isfinite().tolist(), strict=True
        ):
            if finite:
                rewards[number] = reward
            else:
                failures["invalid"] += 1
                name = samples[number].named(number)
                self._warn(name, f"the score is {reward}, not a finite number")
        return Scores(rewards, failures)

    def close(self) -> None:
        """Let the model's memory go."""
        self._model = None

    def _warn(self, name: str, message: str) -> None:
        _log.warning("reward model %s, %s: %s", self._folder, name, message)

    def _text(self, sample: Sample) -> str:
        if not self._whole:
            return sample.completion
        if self._templates is None:
            return f"{sample.prompt}{sample.completion}"
        asked = sample.prompt
        if isinstance(asked, str):
            asked = [{"role": "user", "content": asked}]
        turns = [*asked, {"role": "assistant", "content": sample.completion}]
        turns = [{k: v for k, v in turn.items() if v is not None} for turn in turns]
        return self._templates.render("plain", turns).text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids, at most as many as the model's context."""
        options = {"add_special_tokens": False, "verbose": False}
        texts_ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        before, after = self._around
        room = self._context - len(before) - len(after)
        rows = [_bare(ids, before, after) for ids in texts_ids]
        long = sum(len(row) > room for row in rows)
        if long:
            _log.warning(
                "reward model %s: %d of %d texts are longer than its %d tokens and are scored on "
                "their last", self._folder, long, len(texts), self._context,
            )  # fmt: skip
        return [before + row[max(len(row) - room, 0) :] + after for row in rows]

    @torch.no_grad()
    def _forward(self, texts: list[str]) -> Tensor:
        """Scores [N] on the host; NaN for a text without tokens."""
        reward_N = torch.full((len(texts),), float("nan"), dtype=torch.float64)
        rows = self._encode(texts) if texts else []
        # neighbours in length need little padding
        order = sorted((n for n, row in enumerate(rows) if row), key=lambda n: len(rows[n]))
        for first in range(0, len(order), self._batch_size):
            numbers = order[first : first + self._batch_size]
            reward_N[numbers] = self._scores([rows[n] for n in numbers]).double().cpu()
        return reward_N

    def _scores(self, rows: list[list[int]]) -> Tensor:
        """Scores [B] of one batch."""
        pad = self._pad
        if pad is None:
            # decoders score the last token that is not padding, and refuse a batch without such
            # an id: any will do that ends no text
            ends = {row[-1] for row in rows}
            pad = next(n for n in itertools.count() if n not in ends)
            self._config.pad_token_id = pad
        shape = (len(rows), max(map(len, rows)))
        ids_BT, mask_BT = torch.full(shape, pad), torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            ids_BT[number, : len(row)] = torch.tensor(row)
            mask_BT[number, : len(row)] = 1
        ids_BT, mask_BT = ids_BT.to(self._device), mask_BT.to(self._device)
        scores_BL: Tensor = self._model(input_ids=ids_BT, attention_mask=mask_BT).logits
        return scores_BL[:, self._label].float()


def _context(model: Any, config: Any, tokenizer: Any) -> int:
    """The longest text, in tokens; that of the tokenizer is huge where it does not know it."""
    longest: int = tokenizer.model_max_length
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return longest
    for name, module in model.named_modules():  # RoBERTa's begin behind that of padding
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            positions -= padding + 1
    return min(longest, int(positions))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text and after it."""
    bare, whole = (
        list(tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"])
        for special in (False, True)
    )
    first = next(n for n in range(len(whole) + 1) if whole[n : n + len(bare)] == bare)
    return whole[:first], whole[first + len(bare) :]


def _bare(ids: list[int], before: list[int], after: list[int]) -> list[int]:
    """A text's ids without what it has around it as the tokenizer would put it."""
    start = len(before) if before and ids[: len(before)] == before else 0
    ids = ids[start:]
    end = len(ids) - len(after) if after and ids[-len(after) :] == after else len(ids)
    return ids[:end]
