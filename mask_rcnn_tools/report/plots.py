"""The report's plots, each an SVG image in a data URI, in which no script can run."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mask_rcnn_plus.engine.curves import STYLE
from mask_rcnn_plus.errors import printable
from mask_rcnn_tools.report.matching import THRESHOLDS
from mask_rcnn_tools.report.metrics import Calibration

# One per run. Colour-blind readers can distinguish them (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00")
_LINE_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")
_MAX_POINTS = 400
_UNIT_SQUARE: Any = {"xlim": (0, 1), "ylim": (0, 1.02)}
_STYLE: Any = {
    **STYLE,
    "svg.fonttype": "none",
    "svg.hashsalt": "mask-rcnn-plus",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
}

P = ParamSpec("P")


def _plot(draw: Callable[Concatenate[Axes, P], None]) -> Callable[P, str]:
    """Turns a function that draws on axes into one that returns the plot's data URI."""

    @wraps(draw)
    def plot(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            # The browser draws the text, with a font that may have what this machine's fonts lack.
            warnings.filterwarnings("ignore", "Glyph")
            figure = Figure(figsize=(4.9, 3.3), layout="constrained")
            axes = figure.subplots()
            draw(axes, *args, **kwargs)
            _add_legend(figure, axes)
            return _svg(figure)

    return plot


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the axes, where it covers no lines, if it has several entries."""
    handles = axes.get_legend_handles_labels()
    if len(handles[0]) < 2:
        return
    for columns in (3, 2, 1):
        legend = figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=8)
        # The browser's font may be a little wider than the font measured here.
        if columns == 1 or legend.get_window_extent().width <= 0.9 * figure.bbox.width:
            return
        legend.remove()


@_plot
def precision_recall(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Precision over recall at three IoUs, from run -> (T, 101), the mean over classes."""
    for run, (label, table) in enumerate(curves.items()):
        for iou, style in ((0.5, "-"), (0.75, "--"), (0.9, ":")):
            t = int(np.abs(THRESHOLDS - iou).argmin())
            name = f"{_short(label, 16)}, IoU {iou:g}" if len(curves) > 1 else f"IoU {iou:g}"
            recalls = np.linspace(0, 1, table.shape[1])
            axes.plot(recalls, table[t], style, color=COLORS[run], label=name)
    axes.set(**_UNIT_SQUARE, xlabel="recall", ylabel="precision")


@_plot
def class_precision_recall(axes: Axes, curves: Mapping[str, Any]) -> None:
    """Precision over recall, from class -> (101,), of at most six classes."""
    for (name, line), color in zip(curves.items(), _LINE_COLORS, strict=False):
        axes.plot(np.linspace(0, 1, len(line)), line, color=color, label=_short(name))
    axes.set(**_UNIT_SQUARE, xlabel="recall", ylabel="precision at IoU 0.5")


@_plot
def error_bars(axes: Axes, splits: Mapping[str, Mapping[str, float]]) -> None:
    """The AP50 that each type of error costs: one bar per type and run."""
    kinds = list(next(iter(splits.values())))
    height = 0.8 / len(splits)
    for run, (label, parts) in enumerate(splits.items()):
        positions = np.arange(len(kinds)) + (run - (len(splits) - 1) / 2) * height
        values = [parts[kind] for kind in kinds]
        axes.barh(positions, values, height * 0.9, color=COLORS[run], label=_short(label))
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("cost in AP50")


@_plot
def calibration(axes: Axes, results: Mapping[str, Calibration]) -> None:
    """The share of right detections over their score; the diagonal is perfect calibration."""
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    for run, (label, result) in enumerate(results.items()):
        filled = result.count > 0
        sizes = 12 + 90 * np.sqrt(result.count[filled] / max(1, result.count.max()))
        points = result.score[filled], result.right[filled]
        axes.plot(*points, color=COLORS[run], linewidth=1)
        axes.scatter(*points, sizes, COLORS[run], label=_short(label))
    axes.set(**_UNIT_SQUARE, xlabel="score", ylabel="share of right detections")


@_plot
def confusion_map(axes: Axes, matrix: Any) -> None:
    """The confusion matrix of many classes; each row shows shares of the true class."""
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.grid(visible=False)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set(
        xlabel="detected class (last column: nothing)", ylabel="true class (last row: nothing)"
    )


@_plot
def curves(
    axes: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str
) -> None:
    """Lines over the iterations, from label -> (iterations, values), of the first six labels."""
    for (label, (x, y)), color in zip(series.items(), _LINE_COLORS, strict=False):
        step = max(1, len(x) // _MAX_POINTS)
        marker = "o" if len(x) < 8 else None
        axes.plot(x[::step], y[::step], color=color, label=_short(label), marker=marker)
    axes.set(xlabel="iteration", ylabel=ylabel)


@_plot
def histogram(axes: Axes, values: Any, xlabel: str) -> None:
    """A histogram; its axis is logarithmic if the values differ by more than a factor of 50."""
    array = np.asarray(values, float)
    array = array[array > 0]
    if array.size and array.max() > 50 * array.min():
        bins: Any = np.geomspace(array.min(), array.max(), 31)
        axes.set_xscale("log")
    else:
        bins = 30
    axes.hist(array, bins, color=COLORS[0])
    axes.set(xlabel=xlabel, ylabel="objects")


def _short(name: str, limit: int = 28) -> str:
    # matplotlib leaves names that begin with an underscore out of a legend, and XML cannot contain
    # control characters.
    name = printable(name).lstrip("_") or "class"
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
