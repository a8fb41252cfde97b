"""Writes the tables of scale.md: plain Megatron beside the plugin, by the plan.

python docs/scale.py
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_dr.plan import memory, timeline, wire
from megatron_dr.plan.buffers import stages
from megatron_dr.plan.hardware import Hardware, Link
from megatron_dr.plan.layout import Layout
from megatron_dr.plan.model import Model
from megatron_dr.plan.rows import Rows, ranks_near_a_node
from megatron_dr.plan.timeline import Batch

PAGE = Path(__file__).with_name("scale.md")
GB = 1e9

# Sizes: config.json of meta-llama/Llama-3.1-8B, meta-llama/Llama-3.1-70B and Qwen/Qwen2.5-32B.
LLAMA_8B = Model(32, 4096, 32, 8, 14336, 128256)
LLAMA_70B = Model(80, 8192, 64, 8, 28672, 128256)
QWEN_32B = Model(64, 5120, 40, 8, 27648, 152064, qkv_bias=True)

H100 = Hardware(
    node=8, memory=80 * GB, memory_bandwidth=2.7e12, inside=Link(350e9, 3e-6),
    between=Link(45e9, 8e-6), flops=450e12, doubles=40e12, solve=3e-3,
)  # fmt: skip
BATCH = Batch(tokens=8192, microbatches=8)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    model: Model
    layout: Layout
    rows: Rows

    def of_ranks(self) -> "Case":
        """With as many ranks to a row as --dr-row-ranks has by default."""
        ranks = ranks_near_a_node(self.layout, H100.node)
        return dataclasses.replace(self, rows=dataclasses.replace(self.rows, ranks=ranks))


def cases() -> Iterator[Case]:
    """What the tables show."""
    name = "Llama-3.1 8B"
    yield Case(name, LLAMA_8B, Layout(dp=8), Rows())
    yield Case(f"{name}, 1 target rank", LLAMA_8B, Layout(dp=8), Rows(target_ranks=1))
    yield Case(f"{name}, 8 slots", LLAMA_8B, Layout(dp=8), Rows(slots=8))
    yield Case(f"{name}, sketches", LLAMA_8B, Layout(dp=8), Rows(exact=False))
    yield Case(name, LLAMA_8B, Layout(dp=64), Rows()).of_ranks()
    yield Case(f"{name}, rows of one rank", LLAMA_8B, Layout(dp=64), Rows())
    name = "Qwen2.5 32B"
    yield Case(name, QWEN_32B, _tensor(dp=4), Rows())
    yield Case(f"{name}, 2 slots in bf16", QWEN_32B, _tensor(dp=4), Rows(slots=2, slot_bytes=2))
    name = "Llama-3.1 70B"
    for dp in (2, 8, 32, 512):
        yield Case(name, LLAMA_70B, _tensor(dp=dp, pp=4), Rows()).of_ranks()
        if dp == 2:
            yield Case(f"{name}, 4 slots", LLAMA_70B, _tensor(dp=dp, pp=4), Rows(slots=4))
        if dp == 32:
            rows = Rows(target_ranks=4)
            yield Case(f"{name}, 4 target ranks", LLAMA_70B, _tensor(dp=dp, pp=4), rows)


def _tensor(dp: int, pp: int = 1) -> Layout:
    return Layout(dp=dp, tp=8, pp=pp, sequence_parallel=True)


def tables() -> str:
    """The part of the page that is made."""
    return "\n".join([*_memory(), "", *_wire(), "", *_seconds()])


def _who(case: Case) -> list[str]:
    layout, rows = case.layout, case.rows
    sizes = [f"TP {layout.tp}"] * (layout.tp > 1) + [f"PP {layout.pp}"] * (layout.pp > 1)
    counts = rows.of(layout)
    return [case.name, f"{layout.world:,}", ", ".join([*sizes, f"DP {layout.dp}"]),
            f"{counts.rows} of {rows.ranks}"]  # fmt: skip


def _memory() -> Iterator[str]:
    head = "weights | gradients | optimizer | plain | slots | target | in flight | grams | ours"
    yield from _head(head)
    for case in cases():
        both = [
            (memory.plain(stage), memory.ours(stage, case.rows))
            for stage in stages(case.model, case.layout)
        ]
        plain, ours = max(both, key=lambda b: sum(b[0].values()) + sum(b[1].values()))
        most = max(sum(p.values()) for p, _ in both)
        together = sum(plain.values()) + sum(ours.values())
        too_much = "" if together <= H100.memory else ", does not fit"
        cells = [*plain.values(), most, *ours.values()]
        yield _line([*_who(case), *(f"{c / GB:.1f}" for c in cells),
                     f"{together / GB:.1f} ({together / most:.2f}){too_much}"])  # fmt: skip


def _wire() -> Iterator[str]:
    yield from _head("plain: in a node | between | ours: in a node | between | between, ours/plain")
    for case in cases():
        levels = []
        for arm in ("plain", "ours"):
            sends = [
                wire.plain(stage) if arm == "plain" else wire.ours(stage, case.rows)
                for stage in stages(case.model, case.layout)
            ]
            found = [wire.by_level(each, lambda rank: rank // H100.node) for each in sends]
            levels += max(found, key=sum)
        ratio = f"{levels[3] / levels[1]:.2f}" if levels[1] else "-"
        yield _line([*_who(case), *(f"{c / GB:.2f}" for c in levels), ratio])


def _seconds() -> Iterator[str]:
    yield from _head("a microbatch | plain exposed | ours | " + " | ".join(PARTS))
    for case in cases():
        each = (
            1.5
            * timeline.backward(stages(case.model, case.layout)[0], H100, BATCH)
            * case.layout.pp
        )
        plain = timeline.exposed(case.model, case.layout, H100, BATCH)
        ours = timeline.exposed(case.model, case.layout, H100, BATCH, case.rows)
        cells = [sum(plain.values()), sum(ours.values()), *(ours.get(p, 0.0) for p in PARTS)]
        yield _line([*_who(case), f"{each * 1e3:,.0f}", *(f"{c * 1e3:.1f}" for c in cells)])


PARTS = ("gradients", "target", "grams", "solve", "sum")


def _head(columns: str) -> Iterator[str]:
    names = ["model", "GPUs", "layout", "rows, of ranks", *columns.split(" | ")]
    yield _line(names)
    yield _line(["---"] * 3 + ["---:"] * (len(names) - 3))


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    made = re.sub(
        r"(<!-- made by docs/scale.py -->\n).*(<!-- end -->)",
        lambda m: f"{m[1]}\n{tables()}\n\n{m[2]}", text, flags=re.S,
    )  # fmt: skip
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
