"""A picture of an ablation: each seed's figure, each row's mean, and the differences by seed."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.ablation_family import Family
from benchmarks.ablation_runs import Run
from benchmarks.ablation_table import differences, measured_metrics, values_of

_PANELS = ("mask AP", "mask AP75", "box AP")
_SEED, _MEAN, _PAPER = "#5b8db8", "#1b1b1b", "#c8553d"


def plot(family: Family, runs: Sequence[Run], path: Path) -> None:
    """Draws a family: above AP by row, below the difference from the baseline by seed.

    Args:
        family: whose rows the runs have.
        runs: finished or not.
        path: of the PNG.
    """
    measured = measured_metrics(family, runs)
    classes = [metric for metric in measured if metric.startswith("mask AP-")]
    metrics = [metric for metric in _PANELS if metric in measured] + classes
    figure = Figure(figsize=(3.8 * max(1, len(metrics)) + 1.2, 1.9 + 0.75 * len(family.rows)))
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(family.title)
    if metrics:
        axes = figure.subplots(2, len(metrics), squeeze=False, sharey=True)
        for column, metric in enumerate(metrics):
            values = {row: values_of(runs, row, metric) for row in family.rows}
            _panel(axes[0][column], values)
            axes[0][column].set_xlabel(f"{metric} (%)")
            more = {row: differences(runs, row, family.baseline, metric) for row in family.rows}
            paper = {row: family.paper_difference(row, metric) for row in family.rows}
            _panel(axes[1][column], more, paper)
            axes[1][column].axvline(0, color="0.7", linewidth=1, zorder=0)
            axes[1][column].set_xlabel(f"{metric}, less {family.baseline}'s")
        axes[0][0].invert_yaxis()
        handles = axes[1][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(
    axes: Axes, values: dict[str, dict[int, float]], paper: dict[str, float | None] | None = None
) -> None:
    """A line a row: a dot a seed, a bar at their mean, and the paper's figure as a diamond."""
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    means = [(y, statistics.fmean(d.values())) for y, d in enumerate(values.values()) if d]
    dots = [(y, value) for y, d in enumerate(values.values()) for value in d.values()]
    axes.scatter([x for _, x in dots], [y for y, _ in dots], color=_SEED, s=28, label="a seed")
    axes.scatter(
        [x for _, x in means],
        [y for y, _ in means],
        marker="|",
        color=_MEAN,
        s=330,
        linewidths=2,
        label="mean of seeds",
    )
    known = [(y, p) for y, p in enumerate((paper or {}).values()) if p is not None]
    if known:  # else the legend would explain what is not there
        axes.scatter(
            [x for _, x in known],
            [y for y, _ in known],
            marker="D",
            facecolors="none",
            edgecolors=_PAPER,
            s=46,
            label="the paper (COCO)",
        )
