"""How the time of the model benchmark's sides grows with images and with detections."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.model_sides import Inputs, Side, set_limits

BATCHES = (1, 2, 4, 6, 8)
DETECTIONS = (1, 50, 100, 200, 300)
KINDS = {"batch": "images of a batch", "detections": "detections of an image"}
_REPEATS = 3
_COLOURS = ("#c8553d", "#5b8db8", "#2a7f62", "#8a6fb0", "#1b1b1b")


@dataclass
class Line:
    """One side's times over a range.

    Attributes:
        kind: a key of ``KINDS``.
        side: its name.
        counts: of images, or of detections as they came out.
        times: median milliseconds of a batch.
        slope, intercept: of the line of least squares, in milliseconds.
        determination: how much of the times' variance the line explains, R^2.
    """

    kind: str
    side: str
    counts: list[float]
    times: list[float]
    slope: float = 0.0
    intercept: float = 0.0
    determination: float = 0.0

    def __post_init__(self) -> None:
        counts, times = np.array(self.counts), np.array(self.times)
        self.slope, self.intercept = (float(x) for x in np.polyfit(counts, times, 1))
        rest = times - (self.slope * counts + self.intercept)
        whole = ((times - times.mean()) ** 2).sum()
        self.determination = float(1 - (rest**2).sum() / whole) if whole else 1.0


@torch.no_grad()
def sweep(
    kind: str,
    sides: Sequence[Side],
    images: Inputs,
    *,
    values: Sequence[int],
    detections: int,
    step: Callable[[], object] = lambda: None,
) -> list[Line]:
    """Times the sides in turns at each value.

    Args:
        kind: "batch" or "detections".
        sides: left with the limit ``detections``.
        images: of which a batch is made; for "batch" at least as many as the largest value.
        values: of images in a batch, or of detections of an image.
        detections: the limit where the batch changes.
        step: called after each run.
    """
    times: dict[str, list[list[float]]] = {side.name: [[] for _ in values] for side in sides}
    counts: dict[str, list[float]] = {side.name: [0.0] * len(values) for side in sides}
    # The values in turns as well, so that a slow minute does not fall on one of them alone.
    for turn in range(1 + _REPEATS):
        for number, value in enumerate(values):
            for side in sides:
                batch = images[:value] if kind == "batch" else images[:1]
                set_limits(side.model, detections=detections if kind == "batch" else value)
                with side.timer.running() as stages:
                    found = side.detect(batch)
                if turn:
                    times[side.name][number].append(sum(stages.values()))
                counts[side.name][number] = (
                    len(batch) if kind == "batch" else statistics.fmean(map(len, found))
                )
                step()
    for side in sides:
        set_limits(side.model, detections=detections)
    return [
        Line(kind, side.name, counts[side.name], [statistics.median(t) for t in times[side.name]])
        for side in sides
    ]


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draws times and their lines of least squares, a panel a kind."""
    kinds = list(dict.fromkeys(line.kind for line in lines))
    figure = Figure(figsize=(5.2 * len(kinds), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        of_kind = [line for line in lines if line.kind == kind]
        for colour, line in zip(_COLOURS, of_kind, strict=False):
            label = f"{line.side}: {line.slope:.3g} ms each, R² {line.determination:.4f}"
            axes.plot(line.counts, line.times, "o", color=colour, markersize=5)
            ends = np.array([0, max(line.counts)])
            axes.plot(ends, line.intercept + line.slope * ends, color=colour, label=label)
        axes.set_xlabel(KINDS[kind])
        axes.set_ylabel("ms a batch")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
