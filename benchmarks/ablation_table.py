"""The results of an ablation: means, spreads and differences per seed, as tables and a plot."""

import csv
import io
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.ablation_runs import METRICS, Family, Run
from benchmarks.harness import markdown_table, number

_SECONDS = {"training s": "train_seconds", "CPU s": "cpu_seconds"}
_CSV_COLUMNS = (
    *("row", "metric", "n", "mean", "sd"),
    *("difference", "difference_sd", "difference_n", "paper", "values"),
)
_PANELS = ("mask AP", "mask AP75", "box AP")
_SEED, _MEAN, _PAPER = "#5b8db8", "#1b1b1b", "#c8553d"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (over n - 1) of one metric over n seeds."""

    n: int
    mean: float | None  # None without seeds
    sd: float | None  # None with fewer than two seeds

    @classmethod
    def of(cls, values: Collection[float]) -> "Spread":
        return cls(
            len(values),
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )

    def text(self, form: str = "{:.1f}") -> str:
        """E.g. "31.2 ± 0.8"; with one seed only the mean; without seeds "-"."""
        spread = "" if self.sd is None else " ± " + form.replace("+", "").format(self.sd)
        return number(self.mean, form) + spread


def row_values(runs: Sequence[Run], row: str, metric: str) -> dict[int, float]:
    """Seed -> the row's value of a metric, of "training s" or of "CPU s"; sorted by seed."""
    values = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.row == row and run.finished:
            source = run.record if metric in _SECONDS else run.results
            value = source.get(_SECONDS.get(metric, metric))
            if value is not None:
                values[run.seed] = value
    return values


def differences(runs: Sequence[Run], row: str, baseline: str, metric: str) -> dict[int, float]:
    """Seed -> the row's value minus the baseline's."""
    ours, theirs = (row_values(runs, name, metric) for name in (row, baseline))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def measured_metrics(family: Family, runs: Sequence[Run]) -> list[str]:
    """The metrics of METRICS, and the AP of the family's classes, as far as a run has them."""
    classes = [f"{task} AP-{name}" for name in family.classes for task in ("box", "mask")]
    return [metric for metric in (*METRICS, *classes) if any(metric in run.results for run in runs)]


def markdown(family: Family, runs: Sequence[Run], facts: Sequence[str]) -> str:
    """The family's table, the differences from the baseline, and the missing runs.

    Args:
        family: the family.
        runs: its runs, finished or not.
        facts: paragraphs below the title: command, data, machine.
    """
    metrics = measured_metrics(family, runs)
    in_paper = [m for m in METRICS if any(m in values for values in family.paper_rows.values())]
    paper_head = [f"paper's {metric}" for metric in in_paper]
    rows, difference_rows = [], []
    for row in family.rows:
        finished = sum(run.row == row and run.finished for run in runs)
        texts = [
            Spread.of(row_values(runs, row, m).values()).text(form)
            for names, form in ((metrics, "{:.1f}"), (_SECONDS, "{:.0f}"))
            for m in names
        ]
        paper = [number(family.paper_rows.get(row, {}).get(m)) for m in in_paper]
        rows.append([row, str(finished), *texts, *paper])
        if row != family.baseline:
            each = [differences(runs, row, family.baseline, m).values() for m in metrics]
            texts = [Spread.of(values).text("{:+.1f}") for values in each]
            paper = [number(family.paper_difference(row, m), "{:+.1f}") for m in in_paper]
            n = max(map(len, each), default=0)
            difference_rows.append([row, str(n), *texts, *paper])
    parts = [
        *(f"# {family.title}", *facts),
        _table(["row", "n", *metrics, *_SECONDS, *paper_head], rows),
        "Mean ± sample standard deviation over n seeds. Training s: iterations times the median "
        "time per iteration. CPU s: of the whole run, including start and evaluation."
        + (f" Paper: {family.paper}." if family.paper else ""),
    ]
    if difference_rows:
        parts.append(f"## Difference from {family.baseline}, by seed")
        parts.append(_table(["row", "n", *metrics, *paper_head], difference_rows))
    failed = [f"- {r.row} seed {r.seed}: {r.record.get('error', '')}" for r in runs if r.failed]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    unfinished = sum(not run.finished and not run.failed for run in runs)
    if unfinished:
        parts.append(f"{unfinished} of {len(runs)} runs are not finished.")
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(markdown_table(head, rows))


def to_csv(family: Family, runs: Sequence[Run]) -> str:
    """One line per row and metric; the column "values" contains SEED=VALUE of each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in family.rows:
        for metric in (*measured_metrics(family, runs), *_SECONDS):
            by_seed = row_values(runs, row, metric)
            less = differences(runs, row, family.baseline, metric) if row != family.baseline else {}
            values, difference = Spread.of(by_seed.values()), Spread.of(less.values())
            moments = (values.mean, values.sd, difference.mean, difference.sd)
            mean, sd, less_mean, less_sd = (number(m, "{:.4f}", "") for m in moments)
            paper = number(family.paper_rows.get(row, {}).get(metric), missing="")
            listed = " ".join(f"{seed}={value:.4f}" for seed, value in by_seed.items())
            writer.writerow(
                [row, metric, values.n, mean, sd, less_mean, less_sd, difference.n, paper, listed]
            )
    return text.getvalue()


def plot(family: Family, runs: Sequence[Run], path: Path) -> None:
    """Draws a PNG: at the top the AP by row, below it the difference from the baseline."""
    measured = measured_metrics(family, runs)
    classes = [metric for metric in measured if metric.startswith("mask AP-")]
    metrics = [metric for metric in _PANELS if metric in measured] + classes
    size = (3.8 * max(1, len(metrics)) + 1.2, 1.9 + 0.75 * len(family.rows))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(family.title)
    if metrics:
        axes = figure.subplots(2, len(metrics), squeeze=False, sharey=True)
        for (above, below), metric in zip(axes.T, metrics, strict=True):
            _panel(above, {row: row_values(runs, row, metric) for row in family.rows})
            above.set_xlabel(f"{metric} (%)")
            less = {row: differences(runs, row, family.baseline, metric) for row in family.rows}
            _panel(below, less, {row: family.paper_difference(row, metric) for row in family.rows})
            below.axvline(0, color="0.7", linewidth=1, zorder=0)
            below.set_xlabel(f"{metric}, difference from {family.baseline}")
        axes[0][0].invert_yaxis()
        handles = axes[1][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


def _panel(
    axes: Axes, values: dict[str, dict[int, float]], paper: dict[str, float | None] | None = None
) -> None:
    """One line per row: a dot per seed, a bar for the mean, a diamond for the paper's value."""
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)

    def scatter(points: list[tuple[float, int]], **style: Any) -> None:
        axes.scatter([x for x, _ in points], [y for _, y in points], **style)

    seeds = [(value, y) for y, row in enumerate(values.values()) for value in row.values()]
    means = [(statistics.fmean(row.values()), y) for y, row in enumerate(values.values()) if row]
    known = [(value, y) for y, value in enumerate((paper or {}).values()) if value is not None]
    scatter(seeds, color=_SEED, s=28, label="a seed")
    scatter(means, marker="|", color=_MEAN, s=330, linewidths=2, label="mean of seeds")
    if known:  # otherwise the legend shows a marker that the plot lacks
        style = {"marker": "D", "facecolors": "none", "edgecolors": _PAPER}
        scatter(known, **style, s=46, label="the paper (COCO)")
