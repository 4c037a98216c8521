"""curves.png: the losses, the AP and the learning rate of a run over its iterations."""

import json
import logging
import math
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mask_rcnn_plus.data.mask_rules import is_number
from mask_rcnn_plus.engine import saving
from mask_rcnn_plus.errors import printable, reason
from mask_rcnn_plus.files import replacing

logger = logging.getLogger(__name__)

CURVES = "curves.png"
STYLE = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
"""matplotlib's settings for all plots of the project."""

# Colour-blind readers can distinguish them (Okabe and Ito 2008). The total loss is black.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLES = ("-", "--", ":")


class Panel(NamedTuple):
    """Lines to draw on the same axes: label -> (iterations, values)."""

    title: str
    ylabel: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]


def read_metrics(text: str) -> list[dict[str, float]]:
    """The numbers of each logged iteration, in order, from the text of a run's ``metrics.json``.

    Skips damaged lines and values that are not finite. Where a run repeated iterations, because it
    resumed or started from 0 again, only the last pass counts.
    """
    rows: dict[int, dict[str, float]] = {}
    newest = -1
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        iteration = row.get("iteration") if isinstance(row, dict) else None
        if type(iteration) is not int or not is_number(iteration):
            continue
        if "lr" in row:  # in order, unlike metrics, which may be written later
            if iteration <= newest:
                rows = {i: numbers for i, numbers in rows.items() if i < iteration}
            newest = iteration
        numbers = {key: float(value) for key, value in row.items() if is_number(value)}
        rows.setdefault(iteration, {}).update(numbers)
    return [rows[iteration] for iteration in sorted(rows)]


def panels(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """What to draw of a run: losses, AP if it was measured more than once, and learning rate.

    Args:
        rows: from :func:`read_metrics`.
    """
    lines: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        for key, value in row.items():
            lines[key][0].append(row["iteration"])
            lines[key][1].append(value)
    losses = [key for key in lines if "loss" in key.lower()]
    validation = [key for key in losses if "val" in key.lower()]
    training = [key for key in losses if key not in validation]
    ap = [key for key in lines if key.endswith("/AP") and len(lines[key][0]) > 1]
    kinds = (
        ("Training losses", "loss", sorted(training, key=_is_part)),
        ("Validation losses", "loss", sorted(validation, key=_is_part)),
        ("AP during training", "AP", ap),
        ("Learning rate", "learning rate", [key for key in lines if key == "lr"]),
    )
    return [
        Panel(title, label, {k: lines[k] for k in keys}) for title, label, keys in kinds if keys
    ]


def _is_part(loss: str) -> bool:
    return not loss.endswith("total_loss")


def write_curves(folder: Path) -> None:
    """Draws ``curves.png`` from the ``metrics.json`` of a run's folder.

    Draws nothing if only one iteration was logged. If drawing fails, the log says why.

    Raises:
        SaveError: the disk is full or does not accept writing.
    """
    path = folder / CURVES
    try:
        text = (folder / "metrics.json").read_text(encoding="utf-8", errors="replace")
        if len(rows := read_metrics(text)) > 1 and (shown := panels(rows)):
            with replacing(path, "wb") as file:
                _draw(shown, folder.name, file)
    except Exception as error:  # a picture is not worth a run
        if isinstance(error, OSError) and error.errno in saving.NO_WRITING:
            raise saving.failure(path, error) from error
        logger.warning(f"{path} was not drawn: {type(error).__name__}: {reason(error)}")


def _draw(shown: Sequence[Panel], title: str, file: Any) -> None:
    # Imported here because it takes half a second. Without pyplot and its global state.
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # whatever the user's own settings; leaves the backend as it is
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph")
        figure = Figure(figsize=(6.4 * columns, 3.9 * rows), dpi=110, layout="constrained")
        figure.suptitle(printable(title), fontsize=12)
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, panel in zip(grid, shown, strict=False):
            _draw_panel(axes, panel)
        for axes in grid[len(shown) :]:
            axes.set_axis_off()
        figure.savefig(file, format="png")


def _draw_panel(axes: Any, panel: Panel) -> None:
    axes.set(title=panel.title, xlabel="iteration", ylabel=panel.ylabel)
    tops, color = [], 0
    for label, (x, y) in panel.lines.items():
        line: dict[str, Any] = {"color": "black", "linewidth": 2}
        if panel.ylabel != "loss" or _is_part(label):
            line = {
                "color": _COLORS[color % len(_COLORS)],
                "linestyle": _STYLES[color // len(_COLORS) % len(_STYLES)],
                "linewidth": 1.4,
            }
            color += 1
        if len(x) < 30:
            line.update(marker="o", markersize=3)
        name = printable(label).lstrip("_")[:40]
        if panel.ylabel == "AP":
            best = max(range(len(y)), key=y.__getitem__)
            name += f" (best: {y[best]:.1f} at {x[best]:.0f})"
        values = np.asarray(y)
        if panel.title == "Training losses":
            axes.plot(x, values, color=line["color"], linewidth=0.8, alpha=0.25)
            values = _smoothed(values)
        axes.plot(x, values, label=name, **line)
        tops.append(np.percentile(values, 98))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.ylabel == "loss" and max(tops) > 0:
        axes.set_ylim(min(0.0, axes.get_ylim()[0]) if min(tops) < 0 else 0, 1.15 * max(tops))
    if panel.ylabel == "AP":
        axes.set_ylim(bottom=0)
    if panel.ylabel != "learning rate":
        axes.legend(fontsize=8, ncols=1 + (len(panel.lines) > 8))


def _smoothed(values: Any) -> Any:
    """The mean over neighbours, fewer near the ends: about 3 % of all values."""
    weights = np.ones(1 + 2 * (len(values) // 60))
    if len(weights) == 1:
        return values
    return np.convolve(values, weights, "same") / np.convolve(np.ones_like(values), weights, "same")
