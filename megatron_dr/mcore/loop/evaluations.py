"""Megatron's evaluations in a run with the plugin: how they are called, and what follows on them.

Megatron evaluates every --eval-interval, at the end of a run once more, and then its test set if
there is one. The best checkpoint is judged by the first two. The target's own test set comes last,
once, and nothing is chosen by it.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from megatron_dr.mcore.loop.best import Best
from megatron_dr.mcore.loop.run import TrainingRun
from megatron_dr.mcore.loop.target_role import with_means
from megatron_dr.report.run_log import is_loss

_END, _TEST = " on validation set", " on test set"  # how Megatron's prefixes end


class Evaluations:
    """Of one run.

    Args:
        best: None where none is kept.
    """

    def __init__(self, run: TrainingRun, best: Best | None) -> None:
        self.run, self.best = run, best
        self._found: dict[str, Any] = {}
        self._state: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, run: TrainingRun, keep_best: bool) -> "Evaluations":
        """Of a run that keeps its best checkpoint, or not (collective)."""
        from megatron.training import training

        write = training.save_checkpoint_and_time
        return cls(run, Best(run.args, *run.source.judged_by, write) if keep_best else None)

    def of_sets(
        self, stock: Callable[..., Any], prefix: str, forward_step: Any, data: Any, model: Any,
        iteration: int, process: Any, config: Any, *rest: Any, **groups: Any,
    ) -> None:  # fmt: skip
        """Megatron's `evaluate_and_print_results`."""
        self._found, self.run.is_test = {}, prefix.endswith(_TEST)
        self.run.validations = 0
        stock(prefix, forward_step, data, model, iteration, process, config, *rest, **groups)
        if self.best is not None and not self.run.is_test:
            self.best.see(iteration, self._found)
        if prefix.endswith(_END):
            self._keep(iteration)
            groups = {n: groups[n] for n in ("pg_collection", "p2p_communicator") if n in groups}
            self._test(iteration, forward_step, model, config, groups)

    def of_one(self, stock: Callable[..., Any], *rest: Any, **kwargs: Any) -> Any:
        """Megatron's `evaluate`, of one validation set or the test set."""
        kind, began = self.run.begin_validation(), time.monotonic()
        result = stock(*rest, **kwargs)
        if result[0] is not None:
            found = with_means(result[0], {} if self.run.is_test else self.run.valid.weights)
            result = (found, *result[1:])
            self._found = result[0]
            if self.run.file is not None:
                values = {**result[0], "validation seconds": time.monotonic() - began}
                self.run.file.write(kind, self.run.steps_done, values)
        return result

    def step_is_done(self, stock: Callable[..., Any], *state: Any) -> Any:
        """Megatron's `checkpoint_and_decide_exit`, which has all that a checkpoint needs."""
        self._state = state
        self._keep(state[3])
        return stock(*state)

    def _keep(self, iteration: int) -> None:
        if self.best is None or self._state is None:
            return
        model, optimizer, scheduler, _, flops, _, data = self._state
        kept = self.best.save(
            iteration, model, optimizer, scheduler, flops, train_data_iterator=data
        )
        if kept is not None and self.run.file is not None:
            values = {name: value for name, value in kept.items() if name != "iteration"}
            self.run.file.write("best", iteration, values)

    def _test(
        self, iteration: int, forward_step: Any, model: Any, config: Any, groups: dict[str, Any]
    ) -> None:
        """The target's test set, whole; of the last batch the set's first samples fill up."""
        if not self.run.tests:
            return
        self.run.is_test = True
        from megatron.training import training
        from megatron.training.utils import print_rank_last

        evaluate = training.evaluate.__wrapped__  # Megatron's own
        values: dict[str, Any] = {}
        for name, batches, role in self.run.tests:
            data = role.iterators
            found = evaluate(
                forward_step, data, model, None, config, eval_iters=batches, **groups
            )[0]  # fmt: skip
            if found is None:  # out of time
                return
            values |= {_named(key) + f" {name}" * bool(name): value for key, value in found.items()}
        weights = self.run.watching.weights_of(name for name, *_ in self.run.tests if name)
        values = with_means(values, weights)
        said = [f"{n} value: {float(v):.6E} | {n} PPL: {math.exp(min(20, float(v))):.6E} | "
                if is_loss(n) else f"{n}: {float(v):.6E} | "
                for n, v in values.items()]  # fmt: skip
        print_rank_last(f" target test set at iteration {iteration} | {''.join(said)}")
        if self.run.file is not None:
            self.run.file.write("target test", iteration, values)


def _named(name: str) -> str:
    return "target test loss" if name == "lm loss" else f"target test {name}"
