"""The report's tables, as rows of cells ready to be written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mask_rcnn_tools.report.analysis import ErrorSplit
from mask_rcnn_tools.report.run import Run
from mask_rcnn_tools.report.words import KINDS

_FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_RECALLS = ("AR1", "AR10", "ARmax", "ARs", "ARm", "ARl")
_MOST_PAIRS = 20


def number(value: Any, digits: int = 1) -> str:
    """A figure, or what stands for none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    return "nan" if math.isnan(value) else f"{value:.{digits}f}"


def change(before: Any, after: Any, digits: int = 1) -> str:
    """The difference with its sign; "" where there is none to tell."""
    if not all(isinstance(v, int | float) and not math.isnan(v) for v in (before, after)):
        return ""
    difference = round(after - before, digits)
    return f"{difference:+.{digits}f}" if difference else "±0"


def overall(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of (figure, cells): of one run a table with a column a task; of two a table a task.

    The last cell of a row of two runs is their difference.
    """
    tasks = {task: [_of_all(run, task) for run in runs] for task in KINDS}
    tasks = {task: figures for task, figures in tasks.items() if any(figures)}
    if not tasks:
        return []
    if len(runs) == 1:
        columns = {KINDS[task]: figures[0] for task, figures in tasks.items()}
        return [{"title": "", "columns": list(columns), "rows": _rows(list(columns.values()))}]
    return [
        {
            "title": KINDS[task].capitalize(),
            "columns": [run.label for run in runs],
            "rows": [
                (name, [*cells, change(*values)])
                for (name, cells), values in zip(_rows(figures), _values(figures), strict=True)
            ],
        }
        for task, figures in tasks.items()
    ]


def _names(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    return [n for n in (*_FIGURES, *_RECALLS) if any(f.get(n) is not None for f in figures)]


def _values(figures: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [[f.get(name) for f in figures] for name in _names(figures)]


def _rows(figures: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    return [
        (_title(name, figures), [number(value) for value in values])
        for name, values in zip(_names(figures), _values(figures), strict=True)
    ]


def per_class(run: Run) -> list[dict[str, Any]]:
    """A table a task: class, objects, detections, and all figures."""
    tables = []
    for task, kind in KINDS.items():
        rows = [row for row in run.summary if row["task"] == task and row["class_id"] != ""]
        if rows:
            names = [n for n in (*_FIGURES, *_RECALLS) if any(_known(row[n]) for row in rows)]
            cells = [
                [str(r["objects"]), str(r["detections"]), *(number(r[n]) for n in names)]
                for r in rows
            ]
            tables.append(
                {
                    "kind": kind,
                    "columns": ["objects", "found", *(_title(n, rows) for n in names)],
                    "rows": [(r["class"], c) for r, c in zip(rows, cells, strict=True)],
                }
            )
            continue
        figures = run.figures.get(task)
        simple = {
            name.removeprefix("AP-"): value
            for name, value in (figures.items() if isinstance(figures, Mapping) else ())
            if name.startswith("AP-")
        }
        if simple:
            rows_ = [(name, [number(value)]) for name, value in simple.items()]
            tables.append({"kind": kind, "columns": ["AP"], "rows": rows_})
    return tables


def per_class_changes(before: Run, after: Run) -> dict[str, Any] | None:
    """Class, then for each task AP before, after, and the difference; the largest first."""
    tables = {
        task: [
            {r["class"]: r["AP"] for r in run.summary if r["task"] == task and r["class_id"] != ""}
            for run in (before, after)
        ]
        for task in ("bbox", "segm", "boundary")
    }
    tables = {task: pair for task, pair in tables.items() if all(pair)}
    if not tables:
        return None
    main = "segm" if "segm" in tables else "bbox"

    def by_change(name: str) -> float:
        pair = [values.get(name, math.nan) for values in tables[main]]
        return -abs(pair[1] - pair[0]) if not any(map(math.isnan, pair)) else 1.0

    names = [n for n in tables[main][0] if n in tables[main][1]]
    rows = [
        (
            name,
            [
                cell
                for first, second in tables.values()
                for cell in (
                    number(first.get(name)),
                    number(second.get(name)),
                    change(first.get(name), second.get(name)),
                )
            ],
        )
        for name in sorted(names, key=by_change)
    ]
    return {"kinds": [KINDS[task] for task in tables], "rows": rows}


def errors(splits: Sequence[ErrorSplit]) -> dict[str, Any]:
    """Rows of (type, a cell a run) of the counts, the parts and TIDE's dAP; the parts' sums."""
    return {
        "rows": [
            (
                kind,
                [str(split.counts[kind]) for split in splits],
                [number(split.parts[kind]) for split in splits],
                [number(split.alone[kind]) for split in splits],
            )
            for kind in splits[0].parts
        ],
        "sums": [number(sum(split.parts.values())) for split in splits],
        "ap50": [number(split.ap50) for split in splits],
    }


def confusions(matrix: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The matrix with its strongest cells, and the confusions of two classes by count."""
    between = matrix[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = []
    for cell in order:
        row, column = divmod(int(cell), between.shape[1])
        if between[row, column]:
            pairs.append((names[row], names[column], int(between[row, column])))
    rows = []
    sums = matrix.sum(axis=1)
    for k, name in enumerate([*names, "nothing"]):
        # Background has no true negatives: its row has no share.
        shares = matrix[k] / max(1, sums[k]) if k < len(names) else np.zeros(len(matrix))
        rows.append(
            (name, [(int(v), round(5 * float(s))) for v, s in zip(matrix[k], shares, strict=True)])
        )
    return {"columns": [*names, "nothing"], "rows": rows, "pairs": pairs}


def config_changes(before: Run, after: Run) -> list[tuple[str, str, str]]:
    """The keys whose values differ."""
    first, second = before.settings, after.settings
    return [
        (key, _value(first, key), _value(second, key))
        for key in sorted({*first, *second})
        if _value(first, key) != _value(second, key)
    ]


def _value(settings: Mapping[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "(none)"


def _of_all(run: Run, task: str) -> dict[str, Any]:
    row = next((r for r in run.summary if r["task"] == task and r["class_id"] == ""), None)
    if row is not None:
        return row
    figures = run.figures.get(task)
    return dict(figures) if isinstance(figures, Mapping) else {}


def _title(name: str, figures: Sequence[Mapping[str, Any]]) -> str:
    # Two runs may have been judged with different limits: both are named, in the runs' order.
    limits = dict.fromkeys(int(f["max_dets"]) for f in figures if f.get("max_dets"))
    return f"AR{'/'.join(map(str, limits))}" if name == "ARmax" and limits else name


def _known(value: Any) -> bool:
    return isinstance(value, float) and not math.isnan(value)
