"""The target's data in a run: streams of one set, or of several by name, and their places."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.config.target_sets import TargetSet
from megatron_dr.data.mixed import MixedStream, order_of
from megatron_dr.mcore.say import say
from megatron_dr.mcore.seams.source import Source, target_microbatches
from megatron_dr.mcore.step.schedule import check_number
from megatron_dr.mcore.step.sets import TargetSets

Place = Any  # of a stream: sequences taken by all data ranks; of several sets a table by name


@dataclass
class TargetRole:
    """Target microbatches of a run's steps, or of its validations.

    Attributes:
        streams: a stream for each model chunk; None where this rank reads none.
        number: microbatches in a step or a validation batch, of a rank that runs any.
        size, ranks: sequences in each, and how many data ranks run them.
        sets: which set each is of, where they have names.
    """

    streams: list[Any]
    number: int = 0
    size: int = 0
    ranks: int = 0
    sets: TargetSets | None = None

    @property
    def iterators(self) -> Any:
        """As a schedule takes them."""
        return self.streams if len(self.streams) > 1 else self.streams[0]

    @property
    def weights(self) -> dict[str, float]:
        """Of each set that has a name."""
        if self.sets is None:
            return {}
        return dict(zip(self.sets.names, self.sets.weights, strict=True))

    def begins_at(self, place: Place) -> Place:
        """The place as these streams have one; what is of other sets (--dr-changed-ok) begins."""
        if self.sets is None:
            return place if isinstance(place, int) else 0
        known = place if isinstance(place, dict) else {}
        return {name: known.get(name, 0) for name in self.sets.names}

    def after(self, place: Place) -> Place:
        """The place after a step."""
        together = self.size * self.ranks
        if self.sets is None:
            return place + self.number * together
        return {name: place[name] + self.sets.of.count(k) * together
                for k, name in enumerate(self.sets.names)}  # fmt: skip

    def put(self, place: Place) -> None:
        """Move the streams there."""
        for stream in self.streams:
            if stream is not None:
                stream.consumed = place


class Tested(NamedTuple):
    """A target set that is evaluated at the end of a run.

    Attributes:
        name: empty where it has none.
        batches: of all its samples.
        role: its streams; of a source that makes no use of them, any.
    """

    name: str
    batches: int
    role: TargetRole


def by_set(samples: Any) -> dict[str, Any]:
    """What a source gave: samples by name, '' where there is none; none of None."""
    if samples is None:
        return {}
    return samples if isinstance(samples, dict) else {"": samples}


def role(
    source: Source, samples: Any, microbatches: Mapping[str, int], size: int, ranks: int,
    chunks: int, weights: Mapping[str, float], in_turn: bool = False,
) -> TargetRole:  # fmt: skip
    """Of samples as a source gave them.

    Args:
        microbatches, weights: by set.
        in_turn: one set's microbatches after the other's (`order_of`).
    """
    each = {name: source.streams(one, size, ranks, chunks) for name, one in by_set(samples).items()}
    if "" in each:
        return TargetRole(each[""], microbatches[""], size, ranks)
    order, names = order_of(microbatches, in_turn), tuple(each)
    mixed = [
        None if any(streams[chunk] is None for streams in each.values()) else
        MixedStream({name: streams[chunk] for name, streams in each.items()}, order)
        for chunk in range(chunks)
    ]  # fmt: skip
    sets = TargetSets(names, tuple(weights[n] for n in names), tuple(map(names.index, order)))
    return TargetRole(mixed, len(order), size, ranks, sets)


def of_steps(
    source: Source, samples: Any, args: Namespace, dr: DRConfig, target: TargetConfig, chunks: int
) -> TargetRole:
    """Of a run's training steps."""
    ranks = dr.target_ranks or args.data_parallel_size
    microbatches = target_microbatches(args, dr, target)
    size = target.target_batch // (sum(microbatches.values()) * ranks)
    weights = {one.name: one.weight for one in target.target_sets}
    in_turn = dr.targets == "maximin"
    return role(source, samples, microbatches, size, ranks, chunks, weights, in_turn)


def held_out(
    source: Source, samples: Any, tested: Any, args: Namespace, blank: TargetRole,
    watching: TargetConfig, model: list[Any],
) -> tuple[TargetRole, list[Tested]]:  # fmt: skip
    """(what a validation evaluates, what the end of the run does).

    Args:
        samples, tested: as the source gave them.
        blank: of a source that makes no use of streams.
    """
    chunks, size, ranks = len(model), args.eval_micro_batch_size, args.data_parallel_size
    number = args.eval_global_batch_size // (size * ranks)
    tests = [Tested("", 1, blank)] if source.tests else []
    for name, own in by_set(tested).items():
        batches = -(-len(own) // args.eval_global_batch_size)
        tests.append(
            Tested(name, batches, role(source, own, {"": number}, size, ranks, chunks, {}))
        )
    if samples is None:
        return blank, tests
    names = tuple(by_set(samples))
    found = role(source, samples, dict.fromkeys(names, number), size, ranks, chunks,
                 watching.weights_of(names))  # fmt: skip
    check_number(model, found.number, number, "--eval-global-batch-size")
    return found, tests


def most_repeated(source: Source, samples: Any, target: TargetConfig) -> tuple[TargetSet, int]:
    """The set that a run repeats most, and how many samples of it the run has: by it the rule that
    chooses alpha counts passes, so that no set is worn out."""
    sizes = {name: max(1, source.distinct(one)) for name, one in by_set(samples).items()}
    most = max(target.target_sets, key=lambda one: one.batch / sizes[one.name])
    return most, sizes[most.name]


def say_sets(samples: Any, target: TargetConfig, dr: DRConfig, most: TargetSet) -> None:
    """Several sets, in a line each; `most` is the one that the run repeats most."""
    sizes = {name: len(one) for name, one in by_set(samples).items()}
    for one in target.target_sets if "" not in sizes else ():
        weight = "found at every step" if dr.targets == "maximin" else f"{one.weight:.3g}"
        say(
            f"target set {one.name}: {sizes[one.name]} samples, {one.batch} of them a step, weight "
            f"{weight}"
        )
    if dr.alpha_style == "auto" and len(sizes) > 1:
        say(
            f"note: --dr-alpha-style auto counts passes over {most.name}, the target set that a "
            "step takes the largest part of"
        )


def with_means(values: dict[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """The values, and for each 'target ... NAME' of all sets their mean 'target ...' by weight."""
    if not weights:
        return values
    first = f" {next(iter(weights))}"
    bases = [name.removesuffix(first) for name in values
             if name.startswith("target ") and name.endswith(first)]  # fmt: skip
    means = {
        base: sum(weight * values[f"{base} {name}"] for name, weight in weights.items())
        for base in bases if all(f"{base} {name}" in values for name in weights)
    }  # fmt: skip
    return {**values, **means}
