"""Says what is installed, what the machine has, whether every operator works, and what to do."""

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mask_rcnn_tools.arguments import Parser, UsageError, require_new
from mask_rcnn_tools.doctor.examination import look_at_machine, look_at_python, probe_all
from mask_rcnn_tools.doctor.findings import findings
from mask_rcnn_tools.doctor.report import text

PROGRAM = "mask-rcnn-plus doctor"

_EPILOG = f"""\
examples:
  {PROGRAM}
  {PROGRAM} --output output/balloons --json doctor.json

It runs where torch, detectron2 or the operators do not import or end the process, and says so. It
changes nothing, and needs no network. Paths and the names of data sets are in what it prints: look
it over before you publish it.

exit code: 0 when nothing is broken, whatever it advises; 1 when something is; 2 for a command line
that cannot be followed
"""


def main(argv: Sequence[str]) -> int:
    """Examines, and prints what was found.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if something is broken.

    Raises:
        UsageError: an argument does not fit, or FILE cannot be written.
    """
    arguments = _parse(argv)
    report = examine(arguments.output)
    if arguments.json == "-":
        print(json.dumps(report, indent=1))
    else:
        print(text(report))
    if arguments.json not in (None, "-"):
        try:
            Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"cannot write --json {arguments.json}: {reason}") from error
        print(f"written: {arguments.json}", file=sys.stderr)
    return int(not report["healthy"])


def examine(output: Path) -> dict[str, Any]:
    """The whole report, for json.

    Args:
        output: OUTPUT_DIR of a run.

    Returns:
        "healthy", "broken" and "advice", which are sentences, and the facts behind them: "python",
        "machine", and one entry for each probe.
    """
    report: dict[str, Any] = {"python": look_at_python(), "machine": look_at_machine(output)}
    report |= {name.rstrip("_"): facts for name, facts in probe_all(_tell).items()}
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    broken, advice = findings(report)
    return {"healthy": not broken, "broken": broken, "advice": advice, **report}


def _tell(name: str) -> None:
    """Shows on a terminal what takes its time; there may be no library for bars."""
    if sys.stderr.isatty():
        what = textwrap.shorten(name.replace("_", " ").strip(), 60)
        print(f"\r\033[Klooking at {what} ...", end="", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output"),
        metavar="FOLDER",
        help="OUTPUT_DIR of your runs, whose disk is looked at (default: output)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write it as json as well; - prints json instead"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    arguments = parser.parse_args(argv)
    if arguments.json not in (None, "-"):
        require_new(Path(arguments.json), overwrite=arguments.overwrite, option="--json")
    return arguments
