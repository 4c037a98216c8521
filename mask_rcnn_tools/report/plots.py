"""The report's plots, each an SVG that is a picture of its own: no script of it could run."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mask_rcnn_tools.report.analysis import Calibration

# Of two runs; told apart by eyes that see no red or green as well (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00")
_PARTS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#cc79a7", "#d55e00")
_MOST_POINTS = 400
_STYLE = {
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


def precision_recall(curves: Mapping[str, Any], thresholds: Sequence[float]) -> str:
    """Precision over recall at IoU 0.5, 0.75 and 0.9; a line style a run.

    Args:
        curves: run -> (T, 101), the mean over classes.
        thresholds: T.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for run, (label, table) in enumerate(curves.items()):
            for iou, style in ((0.5, "-"), (0.75, "--"), (0.9, ":")):
                t = int(np.abs(np.asarray(thresholds) - iou).argmin())
                name = f"IoU {iou:g}"
                if len(curves) > 1:
                    name = f"{_short(label, 16)}, {name}"
                recalls = np.linspace(0, 1, table.shape[1])
                axes.plot(recalls, table[t], style, color=COLORS[run], label=name)
        _unit_square(axes, "recall", "precision")
        _legend_below(figure, axes, 3)
        return _svg(figure)


def class_precision_recall(curves: Mapping[str, Any]) -> str:
    """Precision over recall of some classes.

    Args:
        curves: class -> (101,), at most six.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for (name, line), color in zip(curves.items(), _PARTS, strict=False):
            axes.plot(np.linspace(0, 1, len(line)), line, color=color, label=_short(name))
        _unit_square(axes, "recall", "precision at IoU 0.5")
        _legend_below(figure, axes, 3)
        return _svg(figure)


def error_bars(splits: Mapping[str, Mapping[str, float]]) -> str:
    """What each type of error takes from AP50, a bar a type and run."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        kinds = list(next(iter(splits.values())))
        height = 0.8 / len(splits)
        for run, (label, parts) in enumerate(splits.items()):
            places = np.arange(len(kinds)) + (run - (len(splits) - 1) / 2) * height
            values = [parts[kind] for kind in kinds]
            axes.barh(places, values, height * 0.9, color=COLORS[run], label=_short(label))
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("AP50 that it takes")
        if len(splits) > 1:
            _legend_below(figure, axes, 2)
        return _svg(figure)


def calibration(results: Mapping[str, Calibration]) -> str:
    """The share of right detections over their score; the diagonal is what scores promise."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle="--")
        for run, (label, result) in enumerate(results.items()):
            filled = result.count > 0
            sizes = 12 + 90 * np.sqrt(result.count[filled] / max(1, result.count.max()))
            axes.plot(result.score[filled], result.right[filled], color=COLORS[run], linewidth=1)
            axes.scatter(
                result.score[filled], result.right[filled], sizes, COLORS[run], label=_short(label)
            )
        _unit_square(axes, "score", "share that is right")
        if len(results) > 1:
            _legend_below(figure, axes, 2)
        return _svg(figure)


def confusion_map(matrix: Any) -> str:
    """The confusion matrix of many classes, each row as shares of what was there."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = _figure()
        rows = matrix.sum(axis=1, keepdims=True)
        shares = matrix / np.maximum(rows, 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes.set_xlabel("found (the last column: nothing)")
        axes.set_ylabel("there (the last row: nothing)")
        return _svg(figure)


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str) -> str:
    """Lines over the iteration.

    Args:
        series: label -> (iterations, values); the first six are drawn.
        ylabel: what the values are.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        for (label, (x, y)), color in zip(series.items(), _PARTS, strict=False):
            step = max(1, len(x) // _MOST_POINTS)
            marker = "o" if len(x) < 8 else None
            axes.plot(x[::step], y[::step], color=color, label=_short(label), marker=marker)
        axes.set_xlabel("iteration")
        axes.set_ylabel(ylabel)
        if len(series) > 1:
            _legend_below(figure, axes, 3)
        return _svg(figure)


def histogram(values: Sequence[float], xlabel: str) -> str:
    """How often values occur, on a logarithmic axis where they differ by more than 50 times."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure()
        array = np.asarray(values, float)
        array = array[array > 0]
        if array.size and array.max() > 50 * array.min():
            bins = np.geomspace(array.min(), array.max(), 31)
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
    # Inside, it would lie on the lines.
    handles = axes.get_legend_handles_labels()
    for count in range(columns, 0, -1):
        legend = figure.legend(*handles, loc="outside lower center", ncols=count, fontsize=8)
        # The browser's font may be a little wider than the one measured here.
        if count == 1 or legend.get_window_extent().width <= 0.9 * figure.bbox.width:
            return
        legend.remove()


def _unit_square(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def _short(name: str, most: int = 28) -> str:
    # What begins with an underscore is left out of a legend.
    name = name.lstrip("_") or "class"
    return name if len(name) <= most else name[: most - 1] + "…"


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
