"""The report's plots, each an SVG image in a data URI, in which no script can run."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mask_rcnn_tools.report.matching import THRESHOLDS
from mask_rcnn_tools.report.metrics import Calibration

# Of two runs. Colour-blind readers can distinguish them (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00")
_LINE_COLORS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")
_MAX_POINTS = 400
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mask-rcnn-plus",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@matplotlib.rc_context(_STYLE)
def precision_recall(curves: Mapping[str, Any]) -> str:
    """Precision over recall at IoU 0.5, 0.75 and 0.9, each with its own line style.

    Args:
        curves: run -> (T, 101), the mean over classes.
    """
    figure, axes = _figure()
    for run, (label, table) in enumerate(curves.items()):
        for iou, style in ((0.5, "-"), (0.75, "--"), (0.9, ":")):
            t = int(np.abs(THRESHOLDS - iou).argmin())
            name = f"IoU {iou:g}"
            if len(curves) > 1:
                name = f"{_short(label, 16)}, {name}"
            recalls = np.linspace(0, 1, table.shape[1])
            axes.plot(recalls, table[t], style, color=COLORS[run], label=name)
    _unit_square(axes, "recall", "precision")
    _legend_below(figure, axes, 3)
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def class_precision_recall(curves: Mapping[str, Any]) -> str:
    """Precision over recall of some classes.

    Args:
        curves: class -> (101,), at most six.
    """
    figure, axes = _figure()
    for (name, line), color in zip(curves.items(), _LINE_COLORS, strict=False):
        axes.plot(np.linspace(0, 1, len(line)), line, color=color, label=_short(name))
    _unit_square(axes, "recall", "precision at IoU 0.5")
    _legend_below(figure, axes, 3)
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def error_bars(splits: Mapping[str, Mapping[str, float]]) -> str:
    """How much AP50 each type of error costs: one bar per type and run."""
    figure, axes = _figure()
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
    _legend_below(figure, axes, 2)
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def calibration(results: Mapping[str, Calibration]) -> str:
    """The share of right detections over their score; the diagonal is perfect calibration."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
    for run, (label, result) in enumerate(results.items()):
        filled = result.count > 0
        sizes = 12 + 90 * np.sqrt(result.count[filled] / max(1, result.count.max()))
        axes.plot(result.score[filled], result.right[filled], color=COLORS[run], linewidth=1)
        axes.scatter(
            result.score[filled], result.right[filled], sizes, COLORS[run], label=_short(label)
        )
    _unit_square(axes, "score", "share of right detections")
    _legend_below(figure, axes, 2)
    return _svg(figure)


@matplotlib.rc_context({**_STYLE, "axes.grid": False})
def confusion_map(matrix: Any) -> str:
    """The confusion matrix of many classes; each row shows shares of the true class."""
    figure, axes = _figure()
    rows = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(rows, 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xlabel("detected class (last column: nothing)")
    axes.set_ylabel("true class (last row: nothing)")
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> str:
    """Lines over the iterations.

    Args:
        series: label -> (iterations, values); the first six are drawn.
        ylabel: the label of the values.
    """
    figure, axes = _figure()
    for (label, (x, y)), color in zip(series.items(), _LINE_COLORS, strict=False):
        step = max(1, len(x) // _MAX_POINTS)
        marker = "o" if len(x) < 8 else None
        axes.plot(x[::step], y[::step], color=color, label=_short(label), marker=marker)
    axes.set_xlabel("iteration")
    axes.set_ylabel(ylabel)
    _legend_below(figure, axes, 3)
    return _svg(figure)


@matplotlib.rc_context(_STYLE)
def histogram(values: Any, xlabel: str) -> str:
    """A histogram; its axis is logarithmic if the values differ by more than a factor of 50."""
    figure, axes = _figure()
    array = np.asarray(values, float)
    array = array[array > 0]
    if array.size and array.max() > 50 * array.min():
        bins: Any = np.geomspace(array.min(), array.max(), 31)
        axes.set_xscale("log")
    else:
        bins = 30
    axes.hist(array, bins, color=COLORS[0])
    axes.set_xlabel(xlabel)
    axes.set_ylabel("objects")
    return _svg(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.9, 3.3))
    figure.set_layout_engine("constrained")
    return figure, figure.subplots()


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """Adds a legend if there is more than one entry; inside the axes it would cover the lines."""
    handles = axes.get_legend_handles_labels()
    if len(handles[0]) < 2:
        return
    for count in range(columns, 0, -1):
        legend = figure.legend(*handles, loc="outside lower center", ncols=count, fontsize=8)
        # The browser's font may be a little wider than the font measured here.
        if count == 1 or legend.get_window_extent().width <= 0.9 * figure.bbox.width:
            return
        legend.remove()


def _unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _short(name: str, limit: int = 28) -> str:
    # matplotlib leaves names that begin with an underscore out of a legend.
    name = name.lstrip("_") or "class"
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
