"""`--dr-generate`: prompts that the model answers when a run is over, and the answers' scores.

It comes last of all, after validation and when every checkpoint is written, so that nothing which
fails here costs any training. A run that is stopped before its end answers nothing. The answers are
greedy (the likeliest token at each place). Beside the means, which are logged as a validation's
are, each sample is kept, as a line of JSON:

    {"origin": "test.jsonl:1", "prompt": ..., "answer": "...", "reference": "...",
     "truncated": false, "scores": {"exact": 0.0, "f1": 0.5}}

A reward that fails on an answer gives null there; the mean is of the others, and their number is
logged.
"""

import contextlib
import json
import math
import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dr.config.target import TargetConfig
from megatron_dr.mcore import errors
from megatron_dr.mcore.data.samples import chat_of, note_passed_over
from megatron_dr.mcore.data.vocabulary import largest_id
from megatron_dr.mcore.refuse import refuse, single
from megatron_dr.mcore.rl.scorers import score
from megatron_dr.mcore.rollouts.megatron import MegatronRollouts
from megatron_dr.mcore.say import log
from megatron_dr.report import answers
from megatron_dr.report.metrics import MetricsFile
from megatron_dr.rl.prompts import read_asked
from megatron_dr.rl.reward_pool import Sample
from megatron_dr.rl.rollouts import Completion, SamplingParams

Scores = dict[str, list[float | None]]  # by metric, in the order of the samples

_METRICS = "--dr-generate-metrics"
_REFUSED = (single("context_parallel_size"), single("expert_model_parallel_size"))


def check(args: Namespace, target: TargetConfig) -> None:
    """Raise ValueError where answers can't be had, scored or kept; after Megatron's own checks."""
    if target.generate is None:
        return
    refuse("--dr-generate does not go with", _REFUSED, args)
    answers.parse(_METRICS, target.generate_metrics)
    if not (args.dr_metrics or args.save):
        raise ValueError(
            "--dr-generate needs a place for its answers: give --dr-metrics, beside whose file "
            "they are written, or --save."
        )


class Generation:
    """Of one run.

    Args:
        model: Megatron's list of model chunks, whose weights are those of the run's end by then.

    Raises:
        ValueError: samples that can't be read, or a reward that can't be loaded, on this rank.
    """

    def __init__(self, model: list[Any], args: Namespace, own: TargetConfig) -> None:
        from megatron.training import get_tokenizer

        assert own.generate is not None
        self.args, self.most, self.tokenizer = args, own.generate_tokens, get_tokenizer()
        self.iteration, self._in_training = args.iteration, False
        self.names = answers.parse(_METRICS, own.generate_metrics)
        note_passed_over(own.generate)
        chat = chat_of(self.tokenizer)
        self.asked = read_asked(own.generate, self.tokenizer, args.seq_length, chat)
        answers.check_rewards(self.names)
        ends = {one.end for one in self.asked if one.end is not None} | {self.tokenizer.eod}
        self.rollouts = MegatronRollouts(model, largest_id(self.tokenizer) + 1, ends)
        self.rollouts.context = min(self.rollouts.context, args.seq_length)
        self.is_last = dist.get_rank() == dist.get_world_size() - 1  # where Megatron logs
        opens = args.dr_metrics and self.is_last
        self.file = MetricsFile(args.dr_metrics) if opens else None

    def train(self, stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
        """Megatron's `train`: a run that is told to stop before its end leaves within it."""
        self._in_training = True
        result = stock(*rest, **kwargs)
        self._in_training, self.iteration = False, result[0]
        return result

    def all_is_saved(self) -> None:
        """No checkpoint is being written any more, and none follows; so too within `train`."""
        if not self._in_training:
            with errors.refused():
                self._run()

    def _run(self) -> None:
        """Answer, score, log and keep (collective)."""
        prompts = [one.prompt for one in self.asked]
        sampling = SamplingParams(self.most, temperature=0.0)
        found = self.rollouts.generate(
            [prompt.tokens for prompt in prompts], sampling, 0, [p.origin for p in prompts]
        )
        texts = [self._text(completion) for completion in found]
        scores = {name: self._scores(name, texts) for name in self.names}
        cut = [completion.finish_reason == "length" for completion in found]
        self._log({**_means(scores), "truncated": statistics.fmean(cut)})
        if self.is_last:
            self._keep(texts, cut, scores)

    def _text(self, completion: Completion) -> str:
        ids = list(completion.ids)
        if completion.finish_reason == "stop":
            ids.pop()  # the token that ends it
        text: str = self.tokenizer.detokenize(ids) if ids else ""
        return text

    def _scores(self, name: str, texts: Sequence[str]) -> list[float | None]:
        """Of each answer; None where a reward failed."""
        pairs = list(zip(self.asked, texts, strict=True))
        if name in answers.METRICS:
            return [answers.METRICS[name](text, one.reference) for one, text in pairs]
        samples = [
            Sample(one.prompt.content, text, one.prompt.answer, one.prompt.origin)
            for one, text in pairs
        ]
        with errors.agreed():
            pool = answers.open_reward(name)
        with contextlib.closing(pool):
            reward_N, _ = score(pool, samples)
        return [None if math.isnan(value) else value for value in reward_N.tolist()]

    def _log(self, values: dict[str, float]) -> None:
        from megatron.training.global_vars import get_tensorboard_writer
        from megatron.training.utils import print_rank_last

        said = "".join(f"{name}: {value:.6E} | " for name, value in values.items())
        print_rank_last(f" generation at iteration {self.iteration} | {said}")
        writer = get_tensorboard_writer()
        for name, value in values.items() if writer else ():
            writer.add_scalar(f"{name} generation", value, self.iteration)
        if self.file is not None:
            self.file.write("generation", self.iteration, values)

    def _keep(self, texts: Sequence[str], cut: Sequence[bool], scores: Scores) -> None:
        """A line for each sample; a disk without room does not end a run."""
        path = _path(self.args)
        lines = [
            {"origin": one.prompt.origin, "prompt": one.prompt.content, "answer": text,
             "reference": one.reference, "truncated": is_cut,
             "scores": {name: values[number] for name, values in scores.items()}}
            for number, (one, text, is_cut) in enumerate(zip(self.asked, texts, cut, strict=True))
        ]  # fmt: skip
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            log(f"megatron_dr: note: {path}: can't be written ({error.strerror}); the answers are "
                "lost")  # fmt: skip
        else:
            log(f"megatron_dr: {len(lines)} answers are in {path}")


def _path(args: Namespace) -> Path:
    """Where the answers are kept."""
    if args.dr_metrics:
        return Path(args.dr_metrics).with_suffix(".generated.jsonl")
    return Path(args.save) / "generated.jsonl"


def _means(scores: Scores) -> dict[str, float]:
    """Of each metric, over the answers that it could score (NaN of none), and how many others
    there are, if any."""
    found = {}
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        found[name] = statistics.fmean(known) if known else math.nan
        if len(known) < len(values):
            found[f"failed {name}"] = float(len(values) - len(known))
    return found
