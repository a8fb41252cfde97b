"""Writes the tables of scale.md: plain Megatron beside the plugin, by the plan.

python docs/scale.py
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dr.plan import memory, reads, step, timeline, wire
from megatron_dr.plan.activations import Kept, Shape
from megatron_dr.plan.buffers import Stage, stages
from megatron_dr.plan.hardware import H100
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.reads import Moved
from megatron_dr.plan.rows import Rows, ranks_near_a_node
from megatron_dr.plan.step import Run
from megatron_dr.plan.timeline import Batch

PAGE = Path(__file__).with_name("scale.md")
GB = 1e9

# Sizes: config.json of meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B and Qwen/Qwen2.5-32B.
LLAMA_8B = Model(32, 4096, 32, 8, 14336, 128256)
LLAMA_70B = Model(80, 8192, 64, 8, 28672, 128256)
QWEN_32B = Model(64, 5120, 40, 8, 27648, 152064, qkv_bias=True)

BATCH = Batch(tokens=8192, microbatches=8)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: Model
    layout: Layout
    rows: Rows

    @property
    def stages(self) -> tuple[Stage, ...]:
        return stages(self.model, self.layout)


def cases() -> Iterator[Case]:
    """What the tables show."""
    name = "Llama-3.1 8B"
    yield _case(name, LLAMA_8B, Layout(dp=8))
    yield _case(f"{name}, 1 target rank", LLAMA_8B, Layout(dp=8), target_ranks=1)
    yield _case(f"{name}, 8 slots", LLAMA_8B, Layout(dp=8), slots=8)
    yield _case(f"{name}, sketches", LLAMA_8B, Layout(dp=8), exact=False)
    yield _case(name, LLAMA_8B, Layout(dp=64))
    yield _case(f"{name}, rows of one rank", LLAMA_8B, Layout(dp=64), ranks=1)
    name = "Qwen2.5 32B"
    yield _case(name, QWEN_32B, _tensor(dp=4))
    yield _case(f"{name}, 2 slots in bf16", QWEN_32B, _tensor(dp=4), slots=2, slot_bytes=2)
    name = "Llama-3.1 70B"
    yield _case(name, LLAMA_70B, _tensor(dp=2, pp=4))
    yield _case(f"{name}, 4 slots", LLAMA_70B, _tensor(dp=2, pp=4), slots=4)
    yield _case(name, LLAMA_70B, _tensor(dp=8, pp=4))
    yield _case(name, LLAMA_70B, _tensor(dp=32, pp=4))
    yield _case(f"{name}, 4 target ranks", LLAMA_70B, _tensor(dp=32, pp=4), target_ranks=4)
    yield _case(name, LLAMA_70B, _tensor(dp=512, pp=4))


def _case(name: str, model: Model, layout: Layout, **rows: Any) -> Case:
    """With as many ranks to a row as --dr-row-ranks has by default, where nothing else is said."""
    return Case(name, model, layout, Rows(**{"ranks": ranks_near_a_node(layout, H100.node)} | rows))


def _tensor(dp: int, pp: int = 1, tp: int = 8) -> Layout:
    return Layout(dp=dp, tp=tp, pp=pp, sequence_parallel=True)


def tables() -> str:
    """The part of the page that is made."""
    return "\n".join([*_memory(), "", *_wire(), "", *_seconds()])


def kernels() -> str:
    """The tables of what kernels of our own would save."""
    return "\n".join([*_saved(), "", *_choices()])


def _who(case: Case) -> list[str]:
    layout, rows = case.layout, case.rows
    sizes = [f"TP {layout.tp}"] * (layout.tp > 1) + [f"PP {layout.pp}"] * (layout.pp > 1)
    counts = rows.of(layout)
    return [case.name, f"{layout.world:,}", ", ".join([*sizes, f"DP {layout.dp}"]),
            f"{counts.rows} of {rows.ranks}"]  # fmt: skip


def _kept(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Plain's parts and what is beside them, of the stage that keeps most."""
    both = [(memory.plain(stage), memory.ours(stage, case.rows)) for stage in case.stages]
    return max(both, key=lambda parts: sum(sum(p.values()) for p in parts))


def _fits(case: Case) -> bool:
    return sum(sum(parts.values()) for parts in _kept(case)) <= H100.memory


def _memory() -> Iterator[str]:
    head = "weights | gradients | optimizer | plain | slots | target | in flight | grams | ours"
    yield from _head(head)
    for case in cases():
        plain, ours = _kept(case)
        stock = sum(plain.values())
        together = stock + sum(ours.values())
        cells = [*plain.values(), stock, *ours.values()]
        ratio = f"{together / GB:.1f} ({together / stock:.2f})"
        ratio += "" if _fits(case) else ", does not fit"
        yield _line([*_who(case), *(f"{c / GB:.1f}" for c in cells), ratio])


def _wire() -> Iterator[str]:
    yield from _head("plain: in a node | between | ours: in a node | between | between, ours/plain")
    for case in cases():
        levels = []
        for sends in (
            [wire.plain(stage) for stage in case.stages],
            [wire.ours(stage, case.rows) for stage in case.stages],
        ):
            found = [wire.by_level(each, lambda rank: rank // H100.node) for each in sends]
            levels += max(found, key=sum)
        ratio = f"{levels[3] / levels[1]:.2f}" if levels[1] else "-"
        yield _line([*_who(case), *(f"{c / GB:.2f}" for c in levels), ratio])


PARTS = ("gradients", "target", "grams", "solve", "sum")


def _seconds() -> Iterator[str]:
    yield from _head(f"computation | plain exposed | ours | {' | '.join(PARTS)} | more, of all")
    for case in filter(_fits, cases()):
        passes = BATCH.microbatches + case.layout.pp - 1
        computed = 1.5 * passes * timeline.backward(case.stages[0], H100, BATCH)
        found = [
            timeline.exposed(case.model, case.layout, H100, BATCH, rows)
            for rows in (None, case.rows)
        ]
        plain, ours = (sum(parts.values()) for parts in found)
        cells = [computed, plain, ours, *(found[1].get(part, 0.0) for part in PARTS)]
        more = f"{100 * (ours - plain) / (computed + plain):.1f}%"
        yield _line([*_who(case), *(f"{c * 1e3:,.1f}" for c in cells), more])


LAYOUTS = (_tensor(dp=4, tp=2), Layout(dp=8), Layout(dp=64))


def _saved() -> Iterator[str]:
    """Of Llama-3.1 8B: memory's time now, by one read, and what that is of a step."""
    names = "products", "sum", "sketches", "their sum"
    yield _line(["GPUs", "layout", "rows, of ranks", "microbatches", "step", *names])
    yield _line(["---"] * 3 + ["---:"] * 6)
    for layout in LAYOUTS:
        for general, target in ((1, 1), (2, 1), (8, 1), (16, 2)):
            rows = Rows(ranks=ranks_near_a_node(layout, H100.node))
            run = Run(LLAMA_8B, layout, Kept(Shape(1, 4096)), general, target, rows)
            whole = sum(step.seconds(run, H100).values())
            who = _who(Case("", LLAMA_8B, layout, rows))[1:]
            cells = [f"{general} + {target}", f"{whole * 1e3:,.0f}"]
            for moved in _moved(layout, rows):
                share = 100 * (moved.now - moved.least) / whole
                cells.append(f"{moved.now * 1e3:,.0f} → {moved.least * 1e3:,.0f}, {share:.2f}%")
            yield _line([*who, *cells])


def _moved(layout: Layout, rows: Rows) -> list[Moved]:
    """Seconds of memory of a stage: of exact rows' products and sum, and of sketches."""
    (stage,), second = stages(LLAMA_8B, layout), 1 / H100.memory_bandwidth
    sketches = dataclasses.replace(rows, exact=False)
    shard, numel = (sum(getattr(b, n) for b in stage.buffers) for n in ("shard", "numel"))
    exact = [reads.products(stage, rows) * shard, reads.summed(stage, rows) * shard]
    sketched = [reads.sketched(stage, sketches) * numel, reads.combined(stage, sketches) * numel]
    return [moved * second for moved in exact + sketched]


def _choices() -> Iterator[str]:
    """What a step waits for in all, whichever gram it has."""
    names = "plain", "exact rows", "sketches", "sketches by kernels"
    yield _line(["GPUs", "layout", "--overlap-grad-reduce", *names])
    yield _line(["---"] * 3 + ["---:"] * 4)
    for layout in LAYOUTS:
        for overlap in (True, False):
            own = dataclasses.replace(layout, overlap=overlap)
            rows = Rows(ranks=ranks_near_a_node(layout, H100.node))
            sketches = dataclasses.replace(rows, exact=False)
            batch = Batch(tokens=4096, microbatches=8)
            waits = [
                sum(timeline.exposed(LLAMA_8B, own, H100, batch, kind).values())
                for kind in (None, rows, sketches)
            ]
            waits.append(waits[-1] - sum(m.now - m.least for m in _moved(own, rows)[2:]))
            who = _who(Case("", LLAMA_8B, layout, rows))[1:3]
            cells = [f"{wait * 1e3:,.0f}" for wait in waits]
            yield _line([*who, "yes" if overlap else "no", *cells])


def _head(columns: str) -> Iterator[str]:
    names = ["model", "GPUs", "layout", "rows, of ranks", *columns.split(" | ")]
    yield _line(names)
    yield _line(["---"] * 3 + ["---:"] * (len(names) - 3))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for begin, made in (("made by docs/scale.py", tables()), ("kernels", kernels())):
        text = re.sub(
            rf"(<!-- {begin} -->\n).*?(<!-- end -->)",
            lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text, flags=re.S,
        )  # fmt: skip
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
