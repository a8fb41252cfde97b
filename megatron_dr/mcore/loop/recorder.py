"""`--dr-record`: who had which weight, gathered when a step is logged and written by rank 0.

Weights stay on the device until then, and samples are two numbers each: so a step that is not
recorded costs nothing, and one that is has no wait more than the log's.
"""

import importlib.util
import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dr.config.dr import DRConfig
from megatron_dr.config.target import TargetConfig
from megatron_dr.data.identities import Identity
from megatron_dr.mcore import collectives, compat
from megatron_dr.mcore.data.named import Named, noted
from megatron_dr.mcore.say import say
from megatron_dr.mcore.step import chosen
from megatron_dr.mcore.step.chosen import Chosen
from megatron_dr.mcore.step.handle import Handle

_LISTED = 64  # samples of a slot or rank, at most, that are listed


def check(args: Namespace, dr: DRConfig, target: TargetConfig) -> None:
    """Raise ValueError where nothing would be recorded; after Megatron's own checks."""
    if target.record is None:
        return
    if importlib.util.find_spec("pyarrow") is None:
        raise ValueError("--dr-record needs pyarrow: pip install 'megatron_dr[data]'.")
    if not dr.weighs_rows:
        raise ValueError(
            f"--dr-record has nothing to record with --dr-set {dr.set}, which weighs no rows: give "
            "another set, or drop it."
        )
    if args.train_iters and args.train_iters < target.record_every:
        raise ValueError(
            f"--dr-record-every {target.record_every} records no step of a run of "
            f"{args.train_iters}: lower it."
        )


class _Sent(NamedTuple):
    """What a rank tells rank 0: its rows, and of the first rank of a model's copy the numbers of
    the samples of each microbatch."""

    rows: Chosen
    data_rank: int
    named: list[np.ndarray]


class Recorder:
    """Of one run.

    Args:
        handle: of the run's model.

    Raises:
        ValueError: the folder can't be written or has another run's record, on rank 0.
    """

    def __init__(self, args: Namespace, target: TargetConfig, handle: Handle) -> None:
        from megatron_dr.report.record import LISTED, Writer

        self._handle, self._every, self._most = handle, target.record_every, target.record_rows
        self._seen: list[torch.Tensor] = []
        self._train: Named | None = None
        self._listed, self._writer = LISTED, None
        if dist.get_rank() == 0:
            assert target.record is not None
            is_new = not args.iteration and (not args.load or args.finetune)
            self._writer = Writer(target.record, args.iteration, is_new)
            if self._writer.cut:
                say(
                    f"--dr-record {target.record}: {self._writer.cut:,} rows of steps after "
                    f"{args.iteration} are cut, which run again"
                )

    @classmethod
    def of(cls, args: Namespace, target: TargetConfig, handle: Handle) -> "Recorder | None":
        """None where nothing is to be recorded."""
        return None if target.record is None else cls(args, target, handle)

    def of_data(self, train: Any) -> Any:
        """The training set, whose samples say who they are."""
        if not Named.can_name(train):
            return train
        named = Named(train)
        self._train = self._train or named
        return named

    def watched(self, schedule: dict[str, Any], step: int) -> dict[str, Any]:
        """The arguments of the schedule call of a step, from 1."""
        self._seen = []
        self._handle.keeps = self._due(step)
        return {**schedule, "data_iterator": noted(schedule["data_iterator"], self._seen)}

    def _due(self, step: int) -> bool:
        return step % self._every == 0

    def logged(self, step: int) -> None:
        """The step is logged (collective)."""
        log = self._handle.log
        if not self._due(step) or log is None or not log.keeps:
            return
        first = dist.get_rank(compat.model_group()) == 0
        seen = [named_N2.cpu().numpy() for named_N2 in self._seen] if first else []
        own = chosen.of_log(log, self._most)
        sent = _Sent(own, parallel_state.get_data_parallel_rank(), seen)
        everyone = collectives.to_first(sent)
        if self._writer is None:
            return
        rows = chosen.extremes(chosen.joined([one.rows for one in everyone]), self._most)
        named = {one.data_rank: one.named for one in everyone if one.named}
        try:
            self._write(self._writer, step, rows, named)
        except (OSError, ValueError) as error:  # the samples' own files
            self._writer.say(error)

    def flush(self) -> None:
        """Write what was gathered since the last time."""
        if self._writer is not None:
            self._writer.flush()

    # -- on rank 0 -------------------------------------------------------------------------------
    def _write(
        self, writer: Any, step: int, rows: Chosen, named: dict[int, list[np.ndarray]]
    ) -> None:
        dr, names = self._handle.dr, self._handle.rows.names
        who = _Who(self._handle, self._train, named)
        kind = "sample" if dr.row_kind.in_layers else dr.rows
        found = [who.of_row(row, kind in self._listed) for row in rows.row.tolist()]
        columns: dict[str, list[Any]] = {
            "step": [step] * len(found), "block": [names[b] for b in rows.block.tolist()],
            "row": rows.row.tolist(), "kind": [kind] * len(found), "weight": rows.weight.tolist(),
            "score": [None if score != score else score for score in rows.score.tolist()],
            "corpus": [corpus for corpus, _ in found],
            **{name: [getattr(own, name) for _, own in found] for name in Identity._fields},
        }  # fmt: skip
        writer.add(columns, rows.left_out, who.sources)


_Found = tuple[str | None, Identity]


class _Who:
    """Who the rows of a step are.

    Args:
        named: of each data rank, the numbers of the samples of its microbatches.

    Attributes:
        sources: sha256 of files that the samples' corpora were prepared from.
    """

    def __init__(
        self, handle: Handle, train: Named | None, named: dict[int, list[np.ndarray]]
    ) -> None:
        self._handle, self._train, self._named = handle, train, named
        self._known: dict[tuple[int, int], _Found] = {}
        self._rows: dict[int, _Found] = {}
        self.sources: dict[str, str] = {}

    def of_row(self, row: int, listed: bool) -> _Found:
        """Corpus and identity, as far as they are known; `listed`: of a slot or rank."""
        if row not in self._rows:
            if self._handle.dr.row_kind.named:
                self._rows[row] = self._domain(row)
            elif listed:
                self._rows[row] = _together(self._of_slot(row))
            else:
                self._rows[row] = self._of_sample(row)
        return self._rows[row]

    def _domain(self, row: int) -> _Found:
        path = None if self._train is None else self._train.corpora[row]
        return self._handle.dr.domains[row], Identity(file=path)

    def _of_sample(self, row: int) -> _Found:
        assert self._handle.log is not None
        unit, place = divmod(row, self._handle.log.width)
        microbatch, rank = divmod(unit, parallel_state.get_data_parallel_world_size())
        try:
            corpus, number = self._named[rank][microbatch][place].tolist()
        except LookupError:
            return None, Identity()
        return self._sample(corpus, number)

    def _of_slot(self, row: int) -> list[_Found]:
        row_map = self._handle.rows.layout.row_map  # type: ignore[attr-defined]
        ranks, slot = row_map.members(row, parallel_state.get_context_parallel_world_size())
        numbers = [
            tuple(pair)
            for of_rank in (self._named.get(rank, []) for rank in ranks)
            for microbatch, named_b2 in enumerate(of_rank)
            if microbatch * row_map.slots // len(of_rank) == slot
            for pair in named_b2.tolist()
        ]
        return [self._sample(*pair) for pair in numbers] if len(numbers) <= _LISTED else []

    def _sample(self, corpus: int, number: int) -> _Found:
        if self._train is None:
            return None, Identity()
        if (corpus, number) not in self._known:
            self.sources |= self._train.sources(corpus)
            found = self._train.corpora[corpus], self._train.identity(corpus, number)
            self._known[corpus, number] = found
        return self._known[corpus, number]


def _together(samples: Sequence[_Found]) -> _Found:
    """Of several samples: what they have in common, and lists of their ids and hashes; the id of a
    sample without one is its file and line."""
    if not samples:
        return None, Identity()
    own = [identity for _, identity in samples]
    ids = [one.id if one.id is not None else f"{one.file}:{one.line}" for one in own]
    corpora, files = {corpus for corpus, _ in samples}, {one.file for one in own}
    return corpora.pop() if len(corpora) == 1 else None, Identity(
        files.pop() if len(files) == 1 else None, own[0].line if len(own) == 1 else None,
        json.dumps(ids, ensure_ascii=False), json.dumps([one.hash for one in own]),
    )  # fmt: skip
