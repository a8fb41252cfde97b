"""Records made by hand."""

from pathlib import Path
from typing import Any

from megatron_dr.report.record import SCHEMA, Writer


def row(step: int, row: int, weight: float, **more: Any) -> dict[str, Any]:
    whole = dict.fromkeys(SCHEMA.names) | {"block": "model", "kind": "sample"}
    return whole | {"step": step, "row": row, "weight": weight} | more


def add(writer: Writer, rows: list[dict[str, Any]], left_out: int = 0, **sources: str) -> None:
    columns = {name: [one[name] for one in rows] for name in SCHEMA.names}
    writer.add(columns, left_out, sources)


def written(folder: Path, rows: list[dict[str, Any]], left_out: int = 0, **sources: str) -> Path:
    """A record of these rows."""
    writer = Writer(folder)
    add(writer, rows, left_out, **sources)
    writer.flush()
    return folder
