"""Trains briefly while the learning rate rises, and finds where the loss falls most steeply."""

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

from mask_rcnn_plus.engine import Trainer
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.freezing import freeze_mode
from mask_rcnn_plus.engine.steps import Steps, amp_dtype
from mask_rcnn_tools.files import write_file

_MOMENTUM = 0.9  # of the running loss
_DIVERGED = 4.0  # stop when the running loss is this multiple of its minimum
_STANDARD_ERRORS = 4.0  # a smaller fall of the loss is noise


@dataclass(frozen=True)
class Curve:
    """The result of a range test."""

    rates: list[float]  # learning rate of each iteration, rising
    losses: list[float]  # loss of each iteration

    @property
    def running(self) -> list[float]:
        """Bias-corrected exponential mean of the losses up to each iteration."""
        mean, means = 0.0, []
        for step, loss in enumerate(self.losses, 1):
            mean = _MOMENTUM * mean + (1 - _MOMENTUM) * loss
            means.append(mean / (1 - _MOMENTUM**step))
        return means

    @property
    def smoothed(self) -> np.ndarray:
        """Mean of the losses with Gaussian weights around each iteration."""
        steps = np.arange(len(self.losses))
        weights = np.exp(-0.5 * ((steps[:, None] - steps) / self._width) ** 2)
        # The last losses may be huge.
        losses = np.minimum(self.losses, _DIVERGED * min(self.running))
        return (weights @ losses) / weights.sum(1)

    @property
    def _width(self) -> float:
        return max(1.5, 0.04 * len(self.losses))

    def suggestion(self) -> float | None:
        """The rate at which the loss falls most steeply before its minimum.

        None if the fall is within four standard errors of the smoothed loss.
        """
        smoothed = self.smoothed
        lowest = int(smoothed.argmin())
        if lowest < 2:
            return None
        spread = float(np.std(np.array(self.losses[: lowest + 1]) - smoothed[: lowest + 1]))
        # Standard error of the difference of two means, each with Gaussian weights: these average
        # 2 * sqrt(pi) * width values.
        error = math.sqrt(2) * spread / math.sqrt(2 * math.sqrt(math.pi) * self._width)
        if smoothed[:lowest].max() - smoothed[lowest] < _STANDARD_ERRORS * error:
            return None
        slopes = np.gradient(smoothed, np.log(self.rates))
        return self.rates[int(slopes[: lowest + 1].argmin())]


def range_test(cfg: CfgNode, *, start: float, end: float, iterations: int) -> Curve:
    """Trains a new model while the learning rate rises.

    Args:
        cfg: from ``config_run.prepare_training``; training starts from MODEL.WEIGHTS.
        start, end: first and last rate, 0 < start < end.
        iterations: largest number of iterations. The test ends early if the loss is not finite, or
            four times its minimum.
    """
    seed_all_rng(max(cfg.SEED, 0))
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    optimizer = Trainer.build_optimizer(cfg, model)
    # Parameter groups, such as biases, may have their own multiple of the base rate.
    factors = [group["lr"] / cfg.SOLVER.BASE_LR for group in optimizer.param_groups]
    curve = Curve([], [])
    batches = Trainer.build_train_loader(cfg)
    steps = Steps(model, batches, optimizer, amp=amp_dtype(cfg), parts=cfg.SOLVER.ACCUMULATE_STEPS)
    freeze_mode(model, cfg.MODEL.FREEZE)
    rates = [start * (end / start) ** (step / (iterations - 1)) for step in range(iterations)]
    progress = tqdm(rates, desc="Learning rates")
    with EventStorage() as storage, progress:
        for rate in progress:
            for group, factor in zip(optimizer.param_groups, factors, strict=True):
                group["lr"] = rate * factor
            try:
                steps.run_step()
            except FloatingPointError:  # in the loss or a proposal
                break
            curve.rates.append(rate)
            curve.losses.append(float(storage.latest()["total_loss"][0]))
            progress.set_postfix(lr=f"{rate:.1e}", loss=f"{curve.losses[-1]:.2f}", refresh=False)
            running = curve.running
            if running[-1] > _DIVERGED * min(running):
                break
    return curve


def plot(curve: Curve, suggestion: float | None, path: Path) -> None:
    """Plots the losses over the rates, with the suggestion as a vertical line."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(curve.rates, curve.losses, color="0.75", linewidth=1, label="per batch")
    axes.plot(curve.rates, curve.smoothed, color="#1b1b1b", label="smoothed")
    if suggestion is not None:
        axes.axvline(
            suggestion, color="#c8553d", linestyle="--", label=f"steepest {suggestion:.2g}"
        )
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.set_ylim(0, min(_DIVERGED * min(curve.running), 1.05 * max(curve.losses)))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    write_file(path, image.getvalue())


def write_csv(curve: Curve, path: Path) -> None:
    """Writes a table of rates, losses and smoothed losses."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("learning rate", "loss", "smoothed loss"))
    writer.writerows(zip(curve.rates, curve.losses, curve.smoothed, strict=True))
    write_file(path, table.getvalue())
