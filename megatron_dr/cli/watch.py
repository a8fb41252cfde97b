"""A run in the terminal while it goes on, docs/report.md.

    megatron-dr watch RUN [--once]

RUN is a run's folder, or the file of its --dr-metrics. It ends with the run, and with Ctrl-C. Where
the output is no terminal, a plain line follows each step. Exit code 1: the run stopped before its
end.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megatron_dr.cli.main import parser_of
from megatron_dr.report import run_log, sparkline, status, tables
from megatron_dr.report.follow import Follower
from megatron_dr.report.run_log import Curve, Line, RunLog

_NUMBER = 10  # letters
_SECONDS = 1.0  # between two looks
_PLAIN = ("dr cos update", "dr rows", "dr alpha", "reward", "step seconds")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("watch", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder, or metrics file")
    parser.add_argument("--once", action="store_true", help="show where it is now, and end")
    return parser.parse_args(argv)


def frame(run: RunLog, width: int) -> Group:
    """A run as it is now: a line for each figure, by its name in the log, with its curve."""
    curves = dict(_curves(run))
    names = max(map(len, curves), default=0)
    room = max(width - names - 2 * _NUMBER - 8, 4)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
    table.add_column("figure", no_wrap=True)
    for name in ("first", "last"):
        table.add_column(name, justify="right", no_wrap=True, min_width=_NUMBER)
    table.add_column("", no_wrap=True)
    for name, curve in curves.items():
        style = "bold red" if curve.not_finite else ""
        table.add_row(Text(name, style), tables.number(curve.values[0]),
                      tables.number(curve.last), sparkline.drawn(curve, min(room, 60)))  # fmt: skip
    head = Text.assemble((run.name, "bold"), f"  {status.sentence(run)}")
    return Group(head, table)


def _curves(run: RunLog) -> Iterator[tuple[str, Curve]]:
    """Losses first."""
    kinds = [kind for kind in run.kinds if kind == "train" or kind.startswith("validation")]
    named = [(kind, name) for kind in kinds for name in run.names(kind)]
    for kind, name in sorted(named, key=lambda of: not run_log.is_loss(of[1])):
        curve = run.curve(kind, name)
        if curve is not None:
            yield name if kind == "train" else f"{name}, {tables.set_of(kind)}", curve


def line_of(line: Line, run: RunLog) -> str | None:
    """A step or a validation in one plain line; None for what is neither."""
    kind = line["kind"]
    if kind in ("run", "blocks", "end"):
        return None
    of = f"/{run.steps}" if run.steps else ""
    shown = [
        f"{name} {tables.number(float(value))}" for name, value in line.items()
        if isinstance(value, (int, float)) and name != "iteration"
        and (kind != "train" or run_log.is_loss(name) or name.endswith(_PLAIN))
    ]  # fmt: skip
    said = [f"step {line['iteration']}{of}", *([kind] if kind != "train" else []), *shown]
    return " | ".join(said)


def watch(follower: Follower, console: Console) -> int:
    """Until the run's end; 1 where it stopped before."""
    follower.read()
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            goes_on = status.goes_on(follower.run)
            follower.read()  # what came before its end
            live.update(frame(follower.run, console.width), refresh=True)
            if goes_on is False or follower.run.has_ended:
                return int(not follower.run.has_ended)
            time.sleep(_SECONDS)


def watch_plainly(follower: Follower) -> int:
    """The same, in lines."""
    while True:
        goes_on = status.goes_on(follower.run)
        for line in follower.read():
            said = line_of(line, follower.run)
            if said is not None:
                print(said, flush=True)
        if goes_on is False or follower.run.has_ended:
            print(status.sentence(follower.run), flush=True)
            return int(not follower.run.has_ended)
        time.sleep(_SECONDS)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 where the run stopped before its end, 2 for what is no run."""
    args, console = arguments(argv), Console()
    try:
        follower = Follower(run_log.read(args.run).path)
        if args.once:
            follower.read()
            console.print(frame(follower.run, console.width))
            return 0
        return watch(follower, console) if console.is_terminal else watch_plainly(follower)
    except (ValueError, OSError) as error:
        print(f"watch: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
