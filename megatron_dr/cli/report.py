"""One page of what a run did and what it was, docs/report.md.

    megatron-dr report RUN [--out FILE.html] [--compare RUN2 ...]

RUN is a run's folder, or the file of its --dr-metrics; it may still be going. The page needs no
network and runs no script.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_dr.cli.main import parser_of
from megatron_dr.report import run_log


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("report", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder, or metrics file")
    parser.add_argument("--out", type=Path, metavar="FILE.html",
                        help="default: report.html beside the metrics")  # fmt: skip
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="RUN",
                        help="runs to lay over it")  # fmt: skip
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> Path:
    """Write the page; where.

    Raises:
        ValueError: no metrics are there.
        OSError: the page can't be written.
    """
    from megatron_dr.cli import report_page

    runs = run_log.read_all([args.run, *args.compare])
    out: Path = args.out or runs[0].path.parent / "report.html"
    if out.resolve() in [one.path.resolve() for one in runs]:
        raise ValueError(f"--out {out}: these are a run's metrics: name another file.")
    out.write_text(report_page.text(runs), encoding="utf-8", errors="backslashreplace")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 2 for what can't be shown, in one sentence."""
    args = arguments(argv)
    try:
        print(f"{run(args)}: written")
    except OSError as error:
        print(f"report: error: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"report: error: {error}: pip install 'megatron_dr[report]'.", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0
