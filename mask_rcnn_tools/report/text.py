"""The report's notes, as sentences, and its tables, as rows of cells."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mask_rcnn_tools.report.matching import RIGHT, Array
from mask_rcnn_tools.report.metrics import Calibration, ErrorSplit
from mask_rcnn_tools.report.run import Run

KINDS = {"bbox": "boxes", "segm": "masks", "boundary": "boundaries", "keypoints": "keypoints"}
ERROR_TEXTS = {
    "class": "at the place of an object, but of another class",
    "location": "of the right class, but with an IoU of only 0.1 to 0.5",
    "both": "near an object, but of another class and badly placed",
    "duplicate": "one more detection of an object that already has a match",
    "background": "at a place without any object",
    "missed": "an object without a right detection, class error or location error",
}
_SIZES = {
    "s": "small objects (below 32 x 32 pixels)",
    "m": "medium objects (from 32 x 32 to 96 x 96 pixels)",
    "l": "large objects (above 96 x 96 pixels)",
}
_METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "ARmax", "ARs", "ARm", "ARl"),
)
_MAX_PAIRS = 20


def notes(run: Run, split: ErrorSplit, calibration: Calibration) -> Iterator[str]:
    """Notes that help to read the metrics; split and calibration are for the main task."""
    analysis, errors = run.analysis, run.analysis.main_matches.errors
    yield from _missing_metrics(run)
    if not len(analysis.detections):
        yield (
            "The model found nothing, so AP is 0 for each class that has objects. Train longer, or "
            "lower MODEL.ROI_HEADS.SCORE_THRESH_TEST."
        )
    elif len(analysis.truth) and not (errors == RIGHT).any():
        yield (
            "No detection is right at IoU 0.5. Check that the classes and the scale of the images "
            "are the same as in training."
        )
    if run.limit >= 0:
        yield from _detection_limit(run)
    if not math.isnan(split.ap50) and split.ap50 < 99.95:
        worst = max(split.parts, key=lambda name: split.parts[name])
        yield (
            f"AP50 of {KINDS[analysis.main_task]} is {100 - split.ap50:.1f} below 100. The largest "
            f"part, {split.parts[worst]:.1f}, is due to the error type {worst}: "
            f"{ERROR_TEXTS[worst]}."
        )
    if abs(calibration.bias) > 0.05:
        over = calibration.bias > 0
        yield (
            f"Scores are {'overconfident' if over else 'underconfident'}: on average "
            f"{100 * abs(calibration.bias):.0f} percentage points {'above' if over else 'below'} "
            "the share of detections that are right."
        )


def _missing_metrics(run: Run) -> Iterator[str]:
    """The reason why an AP is nan, or -1 as pycocotools writes it: "-" in the tables."""
    truth = run.analysis.truth
    if truth.crowd.all():
        what = "only crowds, which do not count" if len(truth) else "no objects"
        yield f"No AP is defined: the ground truth has {what}."
        return
    for size, objects in _SIZES.items():
        values = [getattr(run.metrics, task).get(f"AP{size}", 0) for task in KINDS]
        if any(math.isnan(value) or value < 0 for value in values):
            yield f"The ground truth has no {objects}, so AP{size} and AR{size} are not defined."
    present = set(truth.category[~truth.crowd].tolist())
    absent = [name for k, name in enumerate(run.analysis.class_names) if k not in present]
    if absent:
        these, them = ("this class", "it") if len(absent) == 1 else ("these classes", "them")
        yield (
            f"AP is not defined for {listed(absent)}: the ground truth has no object of {these}. "
            f"The mean over classes excludes {them}."
        )
    if run.metrics.segm and not run.metrics.boundary:
        yield (
            "There is no boundary AP: TEST.BOUNDARY_AP was False, the evaluation was made by "
            "another version, or the ids in the data set are not natural numbers."
        )
    if "segm" not in run.analysis.tasks:
        yield "There are no masks, so this page is only about boxes."


def _detection_limit(run: Run) -> Iterator[str]:
    """Whether TEST.DETECTIONS_PER_IMAGE lowers the metrics."""

    def have(images: int) -> str:
        return "1 image has" if images == 1 else f"{images} images have"

    limit, count = run.limit, len(run.analysis.images)
    objects = run.analysis.truth.per_image(count)
    detections = run.analysis.detections.per_image(count)
    over = int((objects > limit).sum())
    if over:
        recall = 100 * float(np.minimum(objects, limit).sum()) / int(objects.sum())
        yield (
            f"{have(over)} more than {limit} objects, but TEST.DETECTIONS_PER_IMAGE allows "
            f"only {limit} detections: recall cannot exceed {recall:.1f} %, which limits AP too. "
            f"Set it to {int(objects.max())} or more; the evaluation follows it beyond COCO's 100."
        )
    full = int(((detections >= limit) & (objects <= limit)).sum())
    if full and full >= 0.05 * count and limit < 100:
        yield (
            f"{have(full)} as many detections as TEST.DETECTIONS_PER_IMAGE allows ({limit})"
            ". It removes detections with lower scores, which may lower AP: raise it."
        )


def missing_pictures(missing: Collection[str], full: bool, image_root: Path) -> Iterator[str]:
    """The reason why the page lacks some pictures."""
    if missing:
        yield (
            f"Not shown, because the image is not in {image_root}, cannot be read or has another "
            f"size than the json says: {listed(sorted(missing))}. Name another folder with "
            "--image-root."
        )
    if full:
        yield "Some pictures are left out to keep the page below 20 MB."


def listed(names: Sequence[str], limit: int = 8) -> str:
    """The first names, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def number(value: Any, digits: int = 1) -> str:
    """A metric as text; "-" if it is missing or not defined."""
    known = isinstance(value, int | float) and not math.isnan(value)
    return f"{value:.{digits}f}" if known else "-"


def change(before: Any, after: Any) -> str:
    """The difference with its sign; "" if one of the values is missing."""
    if not all(isinstance(v, int | float) and not math.isnan(v) for v in (before, after)):
        return ""
    difference = round(after - before, 1)
    return f"{difference:+.1f}" if difference else "±0"


def overall(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The overall metrics.

    For one run, a table with a column per task; for two runs, a table per task, in which the last
    column is the change.
    """
    tasks = {task: [_overall_metrics(run, task) for run in runs] for task in KINDS}
    tasks = {task: metrics for task, metrics in tasks.items() if any(metrics)}
    if len(runs) == 2:
        labels = [run.label for run in runs]
        return [_table(KINDS[t].capitalize(), labels, pair, True) for t, pair in tasks.items()]
    columns = [KINDS[task] for task in tasks]
    return [_table("", columns, [m for (m,) in tasks.values()], False)] if tasks else []


def _overall_metrics(run: Run, task: str) -> Mapping[str, Any]:
    rows = [r for r in run.summary if r["task"] == task and r["class_id"] == ""]
    return rows[0] if rows else getattr(run.metrics, task)


def _table(
    title: str, columns: Sequence[str], metrics: Sequence[Mapping[str, Any]], with_change: bool
) -> dict[str, Any]:
    rows = []
    for name in _METRICS:
        values = [m.get(name) for m in metrics]
        if any(value is not None for value in values):
            cells = [number(value) for value in values]
            rows.append((_title(name, metrics), cells + ([change(*values)] if with_change else [])))
    return {"title": title, "columns": [*columns, *["change"] * with_change], "rows": rows}


def _title(name: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    # Two runs may have different limits on detections; the title names both, in order.
    limits = dict.fromkeys(int(m["max_dets"]) for m in metrics if m.get("max_dets"))
    return f"AR{'/'.join(map(str, limits))}" if name == "ARmax" and limits else name


def per_class(run: Run) -> list[dict[str, Any]]:
    """A table per task: class, objects, detections, and all metrics; the most objects first.

    "empty" has the classes without objects and detections, which the table leaves out.
    """
    tables = []
    for task, kind in KINDS.items():
        rows = [row for row in run.summary if row["task"] == task and row["class_id"] != ""]
        rows.sort(key=lambda row: (-row["objects"], -row["detections"]))
        empty = [row["class"] for row in rows if not (row["objects"] or row["detections"])]
        rows = [row for row in rows if row["objects"] or row["detections"]]
        names = [n for n in _METRICS if any(not math.isnan(row[n]) for row in rows)]
        columns = ["objects", "detections", *(_title(name, rows) for name in names)]
        cells = [
            (
                row["class"],
                [str(row["objects"]), str(row["detections"]), *(number(row[n]) for n in names)],
            )
            for row in rows
        ]
        if not rows and not empty:  # an evaluation of detectron2, which writes no summary.csv
            ap = {k[3:]: v for k, v in getattr(run.metrics, task).items() if k.startswith("AP-")}
            empty = [name for name, value in ap.items() if math.isnan(value)]
            columns = ["AP"]
            known = sorted((n for n in ap if n not in empty), key=lambda n: -ap[n])
            cells = [(name, [number(ap[name])]) for name in known]
        if cells or empty:
            tables.append({"kind": kind, "columns": columns, "rows": cells, "empty": empty})
    return tables


def per_class_changes(before: Run, after: Run) -> dict[str, Any] | None:
    """By class, for each task: AP before, AP after and the change; the largest change first."""

    def class_ap(run: Run, task: str) -> dict[str, float]:
        rows = (r for r in run.summary if r["task"] == task and r["class_id"] != "")
        return {row["class"]: row["AP"] for row in rows}

    tasks = {t: (class_ap(before, t), class_ap(after, t)) for t in ("bbox", "segm", "boundary")}
    tasks = {task: pair for task, pair in tasks.items() if all(pair)}
    if not tasks:
        return None
    first, second = tasks["segm" if "segm" in tasks else "bbox"]

    def by_change(name: str) -> float:
        size = abs(second[name] - first[name])
        return 1.0 if math.isnan(size) else -size

    rows = []
    for name in sorted((name for name in first if name in second), key=by_change):
        pairs = [(old.get(name), new.get(name)) for old, new in tasks.values()]
        cells = [(number(old), number(new), change(old, new)) for old, new in pairs]
        rows.append((name, list(chain.from_iterable(cells))))
    return {"kinds": [KINDS[task] for task in tasks], "rows": rows}


def confusions(matrix: Array, names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix with a shade for each cell, and the most frequent confusions.

    Classes without objects and detections are left out.
    """
    used = np.flatnonzero((matrix.sum(axis=0) + matrix.sum(axis=1))[:-1])
    matrix = matrix[np.ix_([*used, -1], [*used, -1])]
    names = [names[k] for k in used]
    between = matrix[:-1, :-1].copy()
    np.fill_diagonal(between, 0)
    order = np.argsort(-between, axis=None, kind="stable")[:_MAX_PAIRS]
    pairs = [
        (names[row], names[column], int(between[row, column]))
        for row, column in zip(*np.unravel_index(order, between.shape), strict=True)
        if between[row, column]
    ]
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    # There are no true negatives, so the row of "nothing" has no shares.
    shares[-1] = 0
    rows = [
        (name, [(int(v), round(5 * float(s))) for v, s in zip(counts, share, strict=True)])
        for name, counts, share in zip([*names, "nothing"], matrix, shares, strict=True)
    ]
    return {"columns": [*names, "nothing"], "rows": rows, "pairs": pairs}


def config_changes(before: Run, after: Run) -> list[tuple[str, str, str]]:
    """The config keys whose values differ, with both values."""

    def value(run: Run, key: str) -> str:
        return repr(run.settings[key]) if key in run.settings else "(none)"

    keys = sorted({*before.settings, *after.settings})
    rows = [(key, value(before, key), value(after, key)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def data_rows(run: Run) -> list[tuple[str, str]]:
    """The facts about the test set."""
    truth, images = run.analysis.truth, run.analysis.images
    per_image, area = truth.per_image(len(images)), truth.area[~truth.crowd]
    rows = [
        ("data set", run.data_set),
        ("images", str(len(images))),
        ("objects", str(len(area))),
        ("classes", str(len(run.analysis.class_names))),
        ("crowds (not counted)", str(int(truth.crowd.sum()))),
        ("images without objects", str(int((per_image == 0).sum()))),
    ]
    if len(images):
        average, most = per_image.mean(), int(per_image.max())
        rows.append(("objects per image", f"{average:.1f} on average, at most {most}"))
        sides = [(int(i["width"]), int(i["height"])) for i in images]
        low, high = min(sides, key=math.prod), max(sides, key=math.prod)
        size = f"{low[0]} x {low[1]}"
        rows.append(("image size", size if low == high else f"{size} to {high[0]} x {high[1]}"))
    if len(area):
        counts = np.bincount(np.digitize(area, [32**2, 96**2]), minlength=3)
        shares = ", ".join(f"{100 * share:.0f} %" for share in counts / len(area))
        rows.append(("small, medium, large", shares))
    if train := run.settings.get("DATASETS.TRAIN"):
        names = train if isinstance(train, list | tuple) else [train]
        rows.append(("trained on", ", ".join(map(str, names))))
    return rows
