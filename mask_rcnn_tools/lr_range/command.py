"""Finds a learning rate for a config: trains briefly while the rate rises, and plots the loss."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mask_rcnn_tools.arguments import Parser, positive
from mask_rcnn_tools.files import prepare_output

if TYPE_CHECKING:
    from mask_rcnn_tools.lr_range.range_test import Curve

PROGRAM = "mask-rcnn-plus lr-range"
PLOT, CSV = "lr_range.png", "lr_range.csv"
_MIN_ITERATIONS = 10

_EPILOG = f"""
example:
  {PROGRAM} --config-file configs/small_data.yaml DATASETS.TRAIN "('balloons_train',)"

The rate rises from --start to --end by the same factor at each iteration (Smith, arXiv:1506.01186),
until the end or until the loss is four times its minimum. The command suggests the rate at which
the smoothed loss falls most steeply, for the batch size and optimizer of the config. The test is
short: a third or three times the rate may work as well. The trained weights are not kept.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command: returns 1 if the loss did not fall beyond its noise, else 0."""
    arguments = _parse(argv)
    import mask_rcnn_plus  # noqa: F401  (first, because it repairs detectron2)
    from mask_rcnn_plus.config import load_config
    from mask_rcnn_plus.errors import UserError
    from mask_rcnn_tools.config_run import prepare_training
    from mask_rcnn_tools.lr_range import range_test

    cfg = load_config(arguments.config_file, arguments.opts)
    cfg.OUTPUT_DIR = str(arguments.output)
    prepare_training(cfg)
    curve = range_test.range_test(
        cfg, start=arguments.start, end=arguments.end, iterations=arguments.iterations
    )
    if len(curve.losses) < _MIN_ITERATIONS:
        raise UserError(
            f"the loss was not finite, or four times its minimum, after {len(curve.losses)} "
            f"iterations: use a --start below {arguments.start:g}"
        )
    suggestion = curve.suggestion()
    if suggestion is None:
        print("the loss did not fall beyond its noise: use more --iterations, or set MODEL.WEIGHTS")
    else:
        _print(suggestion, curve, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH)
    # After the result is printed, because the disk may be full.
    range_test.write_csv(curve, arguments.output / CSV)
    range_test.plot(curve, suggestion, arguments.output / PLOT)
    return int(suggestion is None)


def _print(suggestion: float, curve: "Curve", batch: int, reference: int) -> None:
    smoothed = curve.smoothed
    print(
        f"steepest fall at {suggestion:.2g}, minimum of the loss ({min(smoothed):.3f}) at "
        f"{curve.rates[int(smoothed.argmin())]:.2g}, tested up to {curve.rates[-1]:.2g}"
    )
    note = f"SOLVER.IMS_PER_BATCH {batch}"
    if reference not in (0, batch):
        # A run multiplies BASE_LR by batch / reference.
        note = f"for {suggestion:.2g} at {note}: SOLVER.REFERENCE_IMS_PER_BATCH is {reference}"
        suggestion *= reference / batch
    print(f"SOLVER.BASE_LR {suggestion:.2g}  ({note})")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_config()
    parser.add_argument(
        "--start", type=_rate, default=1e-5, metavar="LR", help="first rate (default: 1e-5)"
    )
    parser.add_argument(
        "--end", type=_rate, default=1.0, metavar="LR", help="last rate (default: 1)"
    )
    parser.add_argument(
        "--iterations",
        type=positive,
        default=200,
        metavar="N",
        help=f"number of iterations, at least {_MIN_ITERATIONS} (default: 200)",
    )
    folder = Path("output", "lr_range")
    parser.add_output("FOLDER", f"where to write {PLOT} and {CSV}", default=folder)
    arguments = parser.parse_args(argv)
    if arguments.start >= arguments.end:
        parser.error(f"--start {arguments.start:g} must be below --end {arguments.end:g}")
    if arguments.iterations < _MIN_ITERATIONS:
        parser.error(f"--iterations must be at least {_MIN_ITERATIONS}")
    prepare_output(arguments.output, (PLOT, CSV), overwrite=arguments.overwrite)
    return arguments


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")
    return rate
