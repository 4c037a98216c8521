"""What an ablation's runs add up to: means, spreads, differences by seed, as Markdown and CSV."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.ablation_family import Family
from benchmarks.ablation_runs import METRICS, Run

_CSV_COLUMNS = (
    "row",
    "metric",
    "n",
    "mean",
    "sd",
    "difference",
    "difference_sd",
    "difference_n",
    "paper",
    "values",
)


@dataclass(frozen=True)
class Spread:
    """Figures of several seeds.

    Attributes:
        n: how many.
        mean: their mean; None of none.
        sd: their sample standard deviation, over n - 1; None of fewer than two.
    """

    n: int
    mean: float | None
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(
            len(values),
            statistics.fmean(values) if values else None,
            statistics.stdev(values) if len(values) > 1 else None,
        )

    def text(self, form: str = "{:.1f}") -> str:
        """ "31.2 ± 0.8"; without a spread where there is one figure; "-" where there is none."""
        if self.mean is None:
            return "-"
        spread = "" if self.sd is None else " ± " + form.replace("+", "").format(self.sd)
        return form.format(self.mean) + spread


def values_of(runs: Sequence[Run], row: str, metric: str) -> dict[int, float]:
    """A row's figures by seed, in the order of seeds: of a metric, or "training s" or "CPU s"."""
    keys = {"training s": "train_seconds", "CPU s": "cpu_seconds"}
    figures = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.row == row and run.finished:
            value = run.record.get(keys[metric]) if metric in keys else run.results.get(metric)
            if value is not None:
                figures[run.seed] = value
    return figures


def differences(runs: Sequence[Run], row: str, baseline: str, metric: str) -> dict[int, float]:
    """By seed, how much more the row has than the baseline with the same seed."""
    ours, theirs = (values_of(runs, name, metric) for name in (row, baseline))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def measured_metrics(family: Family, runs: Sequence[Run]) -> list[str]:
    """The metrics of which there is a figure: METRICS, and the AP of the family's classes."""
    named = [f"{task} AP-{name}" for name in family.classes for task in ("box", "mask")]
    return [metric for metric in (*METRICS, *named) if any(metric in run.results for run in runs)]


def markdown(family: Family, runs: Sequence[Run], facts: Sequence[str]) -> str:
    """The family's table, its differences from the baseline, and what is missing.

    Args:
        family: whose rows the runs have.
        runs: finished or not.
        facts: paragraphs to put under the title: command, data, machine.
    """
    metrics = measured_metrics(family, runs)
    paper = [m for m in METRICS if any(m in figures for figures in family.paper_rows.values())]
    head = ["row", "n", *metrics, "training s", "CPU s", *(f"paper's {m}" for m in paper)]
    body = []
    for row in family.rows:
        figures = [Spread.of(list(values_of(runs, row, m).values())) for m in metrics]
        times = [Spread.of(list(values_of(runs, row, m).values())) for m in ("training s", "CPU s")]
        known = [_number(family.paper_rows.get(row, {}).get(m)) for m in paper]
        finished = sum(run.row == row and run.finished for run in runs)
        texts = [f.text() for f in figures] + [t.text("{:.0f}") for t in times]
        body.append([row, str(finished), *texts, *known])
    parts = [f"# {family.title}", *facts, _table(head, body)]
    parts.append(
        "Mean ± sample standard deviation over n seeds. Training s: iterations times an "
        "iteration's median time. CPU s: of the whole run, start and evaluation included."
        + (f" Paper: {family.paper}." if family.paper else "")
    )
    if len(family.rows) > 1:
        parts += _difference_part(family, runs, metrics, paper)
    return "\n\n".join([*parts, *_missing(runs)]) + "\n"


def _difference_part(
    family: Family, runs: Sequence[Run], metrics: Sequence[str], paper: Sequence[str]
) -> list[str]:
    baseline = family.baseline
    head = ["row", "n", *metrics, *(f"paper's {m}" for m in paper)]
    body = []
    for row in family.rows:
        if row == baseline:
            continue
        each = [differences(runs, row, baseline, metric) for metric in metrics]
        known = [_number(family.paper_difference(row, m), "{:+.1f}") for m in paper]
        n = str(max(map(len, each), default=0))
        body.append([row, n, *(Spread.of(list(d.values())).text("{:+.1f}") for d in each), *known])
    return [f"## Less {baseline}, seed by seed", _table(head, body)]


def _missing(runs: Sequence[Run]) -> list[str]:
    failed = [f"- {r.row} seed {r.seed}: {r.record.get('error', '')}" for r in runs if r.failed]
    waiting = sum(not run.finished and not run.failed for run in runs)
    parts = ["Failed:\n\n" + "\n".join(failed)] if failed else []
    return parts + ([f"{waiting} of {len(runs)} runs are not finished."] if waiting else [])


def to_csv(family: Family, runs: Sequence[Run]) -> str:
    """A line a row and metric; ``values`` are the seeds' figures as SEED=FIGURE."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    for row in family.rows:
        for metric in (*measured_metrics(family, runs), "training s", "CPU s"):
            values = values_of(runs, row, metric)
            difference = Spread.of(
                list(differences(runs, row, family.baseline, metric).values())
                if row != family.baseline
                else []
            )
            every = Spread.of(list(values.values()))
            numbers = [every.mean, every.sd, difference.mean, difference.sd]
            mean, sd, more, more_sd = (_number(number, "{:.4f}", "") for number in numbers)
            known = _number(family.paper_rows.get(row, {}).get(metric), "{:.1f}", "")
            listed = " ".join(f"{seed}={value:.4f}" for seed, value in values.items())
            line = [row, metric, every.n, mean, sd, more, more_sd, difference.n, known, listed]
            writer.writerow(line)
    return text.getvalue()


def _number(value: float | None, form: str = "{:.1f}", none: str = "-") -> str:
    return none if value is None else form.format(value)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    # A class may be called "a|b".
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
