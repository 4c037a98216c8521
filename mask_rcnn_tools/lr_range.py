"""Finds a learning rate for a config: trains a little while the rate rises, and plots the loss."""

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.config.values import (
    check_components,
    check_options,
    check_sampler,
    check_solver,
)
from mask_rcnn_plus.device import make_current, resolve_device
from mask_rcnn_plus.engine import Trainer
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.engine.derived import resolve_class_weights
from mask_rcnn_plus.engine.freezing import freeze_mode
from mask_rcnn_plus.engine.setup import prepare_datasets
from mask_rcnn_plus.engine.steps import Steps, amp_dtype
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import Parser, positive, prepare_output
from mask_rcnn_tools.check.before_run import check_data

PROGRAM = "mask-rcnn-plus lr-range"
PLOT, CSV = "lr_range.png", "lr_range.csv"

# How much the running loss keeps of itself a step, and how far it may rise above its lowest.
_SMOOTHING, _DIVERGED = 0.9, 4.0
_STANDARD_ERRORS = 4.0
_FEWEST = 10

_EPILOG = f"""
Example: {PROGRAM} --config-file configs/small_data.yaml DATASETS.TRAIN "('balloons_train',)"

The rate rises from --start to --end by the same factor each iteration (Smith, arXiv:1506.01186), or
until the loss is four times its lowest. Suggested is the rate at which the smoothed loss fell
most steeply, for the config's batch size and optimizer. It is a short look: a third or thrice may
serve as well. The weights are thrown away.
"""


@dataclass(frozen=True)
class Curve:
    """What a range test has seen.

    Attributes:
        rates: of each iteration, rising.
        losses: of each iteration.
    """

    rates: list[float]
    losses: list[float]

    @property
    def running(self) -> list[float]:
        """The losses' exponential mean up to each iteration, without the pull to 0."""
        mean, means = 0.0, []
        for step, loss in enumerate(self.losses, 1):
            mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
            means.append(mean / (1 - _SMOOTHING**step))
        return means

    @property
    def smoothed(self) -> np.ndarray:
        """The losses' mean with Gaussian weights around each iteration."""
        steps = np.arange(len(self.losses))
        weights = np.exp(-0.5 * ((steps[:, None] - steps) / self._width) ** 2)
        # The last losses may be of any size.
        losses = np.minimum(self.losses, _DIVERGED * min(self.running))
        return (weights @ losses) / weights.sum(1)

    @property
    def _width(self) -> float:
        return max(1.5, 0.04 * len(self.losses))

    def suggestion(self) -> float | None:
        """The rate of the steepest fall, before the lowest loss.

        None where the fall is within four standard errors of the smoothed loss.
        """
        smoothed = self.smoothed
        lowest = int(smoothed.argmin())
        if lowest < 2:
            return None
        spread = float(np.std(np.array(self.losses[: lowest + 1]) - smoothed[: lowest + 1]))
        # Of a mean with Gaussian weights, which is one of so many values; of a difference of two.
        error = math.sqrt(2) * spread / math.sqrt(2 * math.sqrt(math.pi) * self._width)
        if smoothed[:lowest].max() - smoothed[lowest] < _STANDARD_ERRORS * error:
            return None
        slopes = np.gradient(smoothed, np.log(self.rates))
        return self.rates[int(slopes[: lowest + 1].argmin())]


def main(argv: Sequence[str]) -> int:
    """Runs the test, writes its plot and table, and prints the suggestion.

    Args:
        argv: the arguments; see ``--help``.

    Returns:
        the exit code: 0, or 1 if the loss did not fall beyond its noise.

    Raises:
        UserError: an argument, the config or the data is wrong.
    """
    arguments = _parse(argv)
    cfg = load_config(arguments.config_file, arguments.opts)
    prepare_output(arguments.output, (PLOT, CSV), overwrite=arguments.overwrite)
    cfg.OUTPUT_DIR = str(arguments.output)
    prepare(cfg)
    curve = range_test(
        cfg, start=arguments.start, end=arguments.end, iterations=arguments.iterations
    )
    if len(curve.losses) < _FEWEST:
        raise UserError(
            f"the loss was not finite, or four times its lowest, after {len(curve.losses)} "
            f"iterations: give a lower --start than {arguments.start:g}"
        )
    suggestion = curve.suggestion()
    _write(curve, arguments.output / CSV)
    plot(curve, suggestion, arguments.output / PLOT)
    print(f"written: {arguments.output / PLOT}, {arguments.output / CSV}", file=sys.stderr)
    if suggestion is None:
        print(
            "the loss did not fall beyond its noise: try more --iterations, or start from weights"
        )
        return 1
    smoothed = curve.smoothed
    print(
        f"steepest fall at {suggestion:.2g}, lowest loss ({min(smoothed):.3f}) at "
        f"{curve.rates[int(smoothed.argmin())]:.2g}, tried up to {curve.rates[-1]:.2g}"
    )
    batch, reference = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_IMS_PER_BATCH
    why = f"SOLVER.IMS_PER_BATCH {batch}"
    if reference not in (0, batch):
        # A run multiplies BASE_LR by batch / reference.
        why = f"for {suggestion:.2g} at {why}: SOLVER.REFERENCE_IMS_PER_BATCH is {reference}"
        suggestion *= reference / batch
    print(f"SOLVER.BASE_LR {suggestion:.2g}  ({why})")
    return 0


def range_test(cfg: CfgNode, *, start: float, end: float, iterations: int) -> Curve:
    """Trains a new model while the learning rate rises, and throws it away.

    Args:
        cfg: checked, its data sets registered; MODEL.WEIGHTS is where it starts.
        start: the first rate, above 0.
        end: the last, above it.
        iterations: how many at most; fewer where the loss becomes 4 times its lowest, or is not
            finite.
    """
    seed_all_rng(max(cfg.SEED, 0))
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    optimizer = Trainer.build_optimizer(cfg, model)
    # Biases may have a rate of their own, in proportion.
    factors = [group["lr"] / cfg.SOLVER.BASE_LR for group in optimizer.param_groups]
    curve = Curve([], [])
    batches = Trainer.build_train_loader(cfg)
    steps = Steps(
        *(model, batches, optimizer),
        amp=amp_dtype(cfg),
        parts=cfg.SOLVER.ACCUMULATE_STEPS,
    )
    freeze_mode(model, cfg.MODEL.FREEZE)
    progress = tqdm(_rates(start, end, iterations), desc="Learning rates", total=iterations)
    with EventStorage() as storage, progress:
        for rate in progress:
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            try:
                steps.run_step()
            except FloatingPointError:  # the loss or a proposal is not finite
                break
            curve.rates.append(rate)
            curve.losses.append(float(storage.latest()["total_loss"][0]))
            progress.set_postfix(lr=f"{rate:.1e}", loss=f"{curve.losses[-1]:.2f}", refresh=False)
            running = curve.running
            if running[-1] > _DIVERGED * min(running):
                break
    return curve


def plot(curve: Curve, suggestion: float | None, path: Path) -> None:
    """Draws the losses over the rates, with the suggestion as a line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color="0.75", linewidth=1, label="a batch")
    axes.plot(curve.rates, curve.smoothed, color="#1b1b1b", label="smoothed")
    if suggestion is not None:
        axes.axvline(
            suggestion, color="#c8553d", linestyle="--", label=f"steepest {suggestion:.2g}"
        )
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.set_ylim(0, min(_DIVERGED * min(curve.running), 1.05 * max(curve.losses)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, epilog=_EPILOG)
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument("--start", type=_rate, default=1e-5, metavar="LR", help="default: 1e-5")
    parser.add_argument("--end", type=_rate, default=1.0, metavar="LR", help="default: 1")
    parser.add_argument("--iterations", type=positive, default=200, help="default: 200")
    parser.add_argument("--output", type=Path, default=Path("output", "lr_range"), metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help=f"replace {PLOT} and {CSV}")
    parser.add_overrides()
    arguments = parser.parse_args(argv)
    if arguments.start >= arguments.end:
        parser.error(f"--start {arguments.start:g} must be below --end {arguments.end:g}")
    if arguments.iterations < _FEWEST:
        parser.error(f"--iterations must be {_FEWEST} or more")
    return arguments


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not '{text}'")
    return rate


def prepare(cfg: CfgNode) -> None:
    """Checks a config that is only trained with, and loads its data sets; freezes it."""
    check_components(cfg)
    device = resolve_device(cfg.MODEL.DEVICE)
    check_solver(cfg, device)
    make_current(device)
    check_options(cfg)
    check_sampler(cfg)
    prepare_datasets(cfg)
    cfg.DATASETS.TEST = ()  # nothing is evaluated
    names = check_datasets(
        cfg, argparse.Namespace(eval_only=False, resume=False), check_data=check_data
    )
    resolve_class_weights(cfg, names)
    cfg.freeze()


def _rates(start: float, end: float, count: int) -> Iterator[float]:
    for step in range(count):
        yield start * (end / start) ** (step / (count - 1))


def _write(curve: Curve, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("learning rate", "loss", "smoothed loss"))
        writer.writerows(zip(curve.rates, curve.losses, curve.smoothed, strict=True))
