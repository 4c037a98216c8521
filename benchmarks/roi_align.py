"""Times RoIAlign over a feature pyramid: ours beside detectron2's ROIPooler and torchvision's."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.roi_case import make_boxes, make_pyramid
from benchmarks.roi_measure import (
    BASELINE,
    DTYPES,
    LAYOUTS,
    MAX_INPUT_SETS,
    SIDES,
    Row,
    Setting,
    measure,
)
from benchmarks.timing import copy_bandwidth
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, positive, prepare_output, require_device, run_command
from mask_rcnn_tools.environment import describe_environment

PROGRAM = "python -m benchmarks.roi_align"
BINS = {1000: 7, 100: 14}  # RoIs of an image -> bins: the box head's and the mask head's
MARKDOWN, JSON = "roi_align.md", "roi_align.json"

_EPILOG = f"""\
example:
  {PROGRAM} --dtypes fp32 --threads 2 --output output/benchmark

The case: P2 to P5 of an 800 x 1333 image, 1000 RoIs into 7 x 7 bins and 100 into 14 x 14, boxes of
16 to 800 pixels. The sides take turns on several input sets; a figure is the median in
milliseconds, and "2.0x" says that ours is twice as fast. Error: the largest difference from fp64 as
a share of the largest value. Floor: the time in which the device's memory moves what must be moved
once. With --output, {MARKDOWN} and {JSON} hold the same and more.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark and prints a Markdown table.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code, 0.

    Raises:
        UserError: an argument does not fit, the output cannot be written, or memory runs out.
    """
    arguments = _parse(argv)
    require_device(arguments.device)
    if arguments.output is not None:
        prepare_output(arguments.output, (MARKDOWN, JSON), overwrite=arguments.overwrite)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    command = shlex.join([*PROGRAM.split(), *argv])
    try:
        report = _run(arguments, command)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(
            f"--device {arguments.device} has too little memory for --channels "
            f"{arguments.channels}; give fewer channels"
        ) from error
    if arguments.output is not None:
        _write(arguments.output / MARKDOWN, "\n".join(report["markdown"]) + "\n")
        del report["markdown"]
        _write(arguments.output / JSON, json.dumps(report, indent=2) + "\n")
        print(f"written: {arguments.output / MARKDOWN}, {JSON}", file=sys.stderr)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rois", type=int, nargs="+", choices=BINS, default=list(BINS))
    parser.add_argument(
        "--sampling",
        type=int,
        nargs="+",
        choices=(2, 0),
        default=[2, 0],
        help="0 adapts to the box",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--channels", type=positive, default=256)
    parser.add_argument("--repeats", type=positive, default=7, help="turns of each side, at most")
    parser.add_argument("--threads", type=positive, help="CPU threads; by default torch's choice")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help=f"write {MARKDOWN} and {JSON} there as well"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of an earlier run")
    return parser.parse_args(argv)


def _run(arguments: argparse.Namespace, command: str) -> dict:
    """Measures and prints; returns what is to be written."""
    environment = describe_environment(arguments.device)
    bandwidth = copy_bandwidth(arguments.device)
    environment["memory"] = f"{bandwidth / 1e6:.1f} GB/s by copying"
    settings = [
        Setting(rois, BINS[rois], ratio, dtype)
        for rois, ratio, dtype in product(arguments.rois, arguments.sampling, arguments.dtypes)
    ]
    markdown = _introduction(environment, command, arguments.device)
    print("\n".join(markdown), flush=True)
    rows = []
    total = len(settings) * len(LAYOUTS) * 2
    with tqdm(total=total, unit="row", disable=not sys.stderr.isatty(), leave=False) as bar:
        for row in _measure_all(arguments, settings, bandwidth):
            rows.append(row)
            markdown.append(_line(row, arguments.device))
            # The bar is on standard error, which may be the same terminal.
            tqdm.write(markdown[-1], file=sys.stdout)
            sys.stdout.flush()
            bar.update()
    return {
        "command": command,
        "environment": environment,
        "channels": arguments.channels,
        "repeats": arguments.repeats,
        "bandwidth_bytes_per_second": bandwidth * 1e3,
        "baseline": BASELINE,
        "rows": [asdict(row) for row in rows],
        "markdown": markdown,
    }


def _measure_all(
    arguments: argparse.Namespace, settings: Sequence[Setting], bandwidth: float
) -> Iterator[Row]:
    seeds, device = range(MAX_INPUT_SETS), arguments.device
    pyramids = [make_pyramid(arguments.channels, seed, device) for seed in seeds]
    for setting in settings:
        yield from measure(
            setting,
            pyramids,
            [make_boxes(setting.rois, seed, device) for seed in seeds],
            repeats=arguments.repeats,
            bandwidth=bandwidth,
            device=device,
        )


def _introduction(environment: dict, command: str, device: str) -> list[str]:
    facts = "; ".join(f"{name} {value}" for name, value in environment.items())
    columns = ["case", "sampling", "dtype", "layout", "direction"]
    columns += [f"{side} ms" for side in (*SIDES, BASELINE)]
    columns += [f"against {side}" for side in (*SIDES[1:], BASELINE)]
    columns += ["floor ms", *(f"error {side}" for side in SIDES[:2])]
    if device == "cuda":
        columns += [f"extra MiB {side}" for side in SIDES]
    return [
        f"`{command}`",
        "",
        facts,
        "",
        f"| {' | '.join(columns)} |",
        "| --- " * len(columns) + "|",
    ]


def _line(row: Row, device: str) -> str:
    def figures(values: dict, names: Sequence[str], form: str) -> list[str]:
        return [form.format(values[n]) if values.get(n) is not None else "-" for n in names]

    cells = [
        f"{row.rois} x {row.bins}x{row.bins}",
        "adaptive" if row.sampling_ratio == 0 else str(row.sampling_ratio),
        row.dtype,
        row.layout,
        row.direction,
    ]
    # Three digits of a GPU's tenths of a millisecond.
    form = "{:.3f}" if device == "cuda" else "{:.2f}"
    cells += figures(row.milliseconds, (*SIDES, BASELINE), form)
    cells += figures(row.speedup, (*SIDES[1:], BASELINE), "{:.2f}x")
    cells += [form.format(row.floor), *figures(row.error, SIDES[:2], "{:.1e}")]
    if device == "cuda":
        cells += figures(row.extra_mib, SIDES, "{:.1f}")
    return f"| {' | '.join(cells)} |"


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        # The table is on the screen; only the file is missing.
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
