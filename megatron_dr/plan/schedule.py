"""When each stage runs which microbatch: 1F1B (`core/pipeline_parallel/schedules.py`), for a
picture. A backward takes twice as long as a forward, or three times with full recompute."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """One forward or backward of a stage, in units of a forward."""

    stage: int
    microbatch: int
    backward: bool
    start: float
    end: float


def one_f_one_b(stages: int, microbatches: int, backward: float = 2.0) -> list[Piece]:
    """All pieces of a step."""
    orders = [_order(stage, stages, microbatches) for stage in range(stages)]
    free, out = [0.0] * stages, []
    done: dict[tuple[int, int, bool], float] = {}
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                number, back = order[0]
                other = stage + 1 if back else stage - 1
                needs = (other, number, back) if 0 <= other < stages else (stage, number, False)
                if needs not in done and (back or stage):
                    break
                start = max(free[stage], done.get(needs, 0.0))
                end = start + (backward if back else 1.0)
                free[stage] = done[stage, number, back] = end
                out.append(Piece(stage, number, back, start, end))
                order.pop(0)
    return out


def _order(stage: int, stages: int, microbatches: int) -> list[tuple[int, bool]]:
    """Microbatches of a stage, and whether backwards."""
    ahead = min(microbatches, stages - stage - 1)
    out = [(number, False) for number in range(ahead)]
    for number in range(microbatches - ahead):
        out += [(ahead + number, False), (number, True)]
    return out + [(number, True) for number in range(microbatches - ahead, microbatches)]
