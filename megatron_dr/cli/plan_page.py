"""The plan's numbers as one HTML page: a rank's memory and a step's timeline, drawn."""

from pathlib import Path
from typing import Any

from megatron_dr.cli import pages, plan_tables
from megatron_dr.plan.schedule import one_f_one_b

GB = 1e9
_LEFT, _RIGHT, _ROW = 80, 990, 30  # of pictures 1000 wide
_PIECES = 2000  # of a timeline; a longer step is drawn by its parts alone
# Okabe and Ito's colours: told apart by colour-blind readers too
COLOURS = {
    "weights": "#0072b2", "gradients": "#56b4e9", "optimizer": "#009e73", "activations": "#f0e442",
    "slots": "#cc79a7", "target": "#d55e00", "in flight": "#999999", "grams": "#707070",
}  # fmt: skip
STEP = {
    "forward, general": "#56b4e9", "backward, general": "#0072b2", "forward, target": "#e69f00",
    "backward, target": "#d55e00", "exposed": "#cc79a7", "optimizer": "#009e73",
}  # fmt: skip
_EXPOSED = ("gradients", "target", "grams", "solve", "sum", "parameters")


def write(numbers: dict[str, Any], path: Path) -> None:
    """The page of a run's report."""
    template = pages.template("plan")
    heads, stages = plan_tables.shown_stages(numbers)
    memory = {
        "title": "Memory, GB", "head": ["part", *heads],
        "rows": [[part, *(f"{numbers['memory']['stages'][n][part] / GB:.2f}" for n in stages)]
                 for part in numbers["memory"]["stages"][0]],
    }  # fmt: skip
    seconds = {
        "title": "Seconds of a step", "head": ["part", "plain", "ours"],
        "rows": plan_tables.seconds_of(numbers),
    }  # fmt: skip
    text = template.render(
        heading=plan_tables.heading(numbers), refusal=numbers["refusal"],
        sentences=[*plan_tables.sentences(numbers), *numbers["chosen"]],
        memory=memory_picture(numbers), step=step_picture(numbers), tables=[memory, seconds],
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")


def memory_picture(numbers: dict[str, Any]) -> dict[str, Any]:
    """A bar for each stage, and a line at what a GPU has."""
    stages, usable = numbers["memory"]["stages"], numbers["memory"]["usable"]
    scale = (_RIGHT - 60 - _LEFT) / max(usable, numbers["memory"]["most"])
    bars, texts = [], []
    for number, parts in enumerate(stages):
        x, y = float(_LEFT), number * _ROW + 4
        for name, size in parts.items():
            if size:
                title = f"{name}: {size / GB:.2f} GB"
                bars.append(_bar(x, y, size * scale, COLOURS[name], title))
                x += size * scale
        texts.append(_text(_LEFT - 6, y + 15, f"stage {number}", "end"))
        texts.append(_text(x + 5, y + 15, f"{sum(parts.values()) / GB:.1f} GB", "start"))
    legend = [
        (name, colour) for name, colour in COLOURS.items() if any(s.get(name) for s in stages)
    ]
    return {
        "bars": bars, "texts": texts, "legend": legend, "height": len(stages) * _ROW + 30,
        "limit": round(_LEFT + usable * scale, 1), "limit_text": f"{usable / GB:.0f} GB",
    }  # fmt: skip


def step_picture(numbers: dict[str, Any]) -> dict[str, Any]:
    """Every microbatch on every stage, then what is exposed, and the optimizer."""
    seconds, batch = numbers["seconds"]["ours"], numbers["batch"]
    stages, targets = numbers["layout"]["pp"], batch["target_microbatches"]
    if numbers["rows"] is not None and numbers["rows"]["target_ranks"]:
        targets = 0  # other ranks run them
    number = batch["general_microbatches"] + targets
    whole = sum(seconds.values())
    scale = (_RIGHT - _LEFT) / whole
    late = {"exposed": sum(seconds.get(name, 0.0) for name in _EXPOSED),
            "optimizer": seconds["optimizer"]}  # fmt: skip
    bars = _pieces(stages, number, targets, (whole - sum(late.values())) * scale)
    x = _LEFT + (whole - sum(late.values())) * scale
    for name, size in late.items():
        bars += [
            _bar(x, stage * _ROW + 4, size * scale, STEP[name], f"{name}: {size * 1e3:.1f} ms")
            for stage in range(stages)
        ]
        x += size * scale
    texts = [_text(_LEFT - 6, s * _ROW + 19, f"stage {s}", "end") for s in range(stages)]
    texts.append(_text(_LEFT, stages * _ROW + 22, "0", "middle"))
    texts.append(_text(_RIGHT, stages * _ROW + 22, f"{whole:.3g} s", "end"))
    return {"bars": bars, "texts": texts, "legend": list(STEP.items()),
            "height": stages * _ROW + 30}  # fmt: skip


def _pieces(stages: int, number: int, targets: int, width: float) -> list[dict[str, Any]]:
    if 2 * stages * number > _PIECES:
        colour = STEP["backward, general"]
        return [_bar(_LEFT, s * _ROW + 4, width, colour, f"{number} microbatches")
                for s in range(stages)]  # fmt: skip
    found = one_f_one_b(stages, number)
    scale = width / max(piece.end for piece in found)
    out = []
    for piece in found:
        way = "backward" if piece.backward else "forward"
        role = "target" if piece.microbatch < targets else "general"
        out.append(_bar(
            _LEFT + piece.start * scale, piece.stage * _ROW + 4,
            max(0.5, (piece.end - piece.start) * scale - 0.5), STEP[f"{way}, {role}"],
            f"{way} of microbatch {piece.microbatch}, {role}",
        ))  # fmt: skip
    return out


def _bar(x: float, y: float, width: float, colour: str, title: str) -> dict[str, Any]:
    return {"x": round(x, 2), "y": y, "width": round(width, 2), "height": _ROW - 8,
            "colour": colour, "title": title}  # fmt: skip


def _text(x: float, y: float, text: str, anchor: str) -> dict[str, Any]:
    return {"x": round(x, 1), "y": y, "text": text, "anchor": anchor}
