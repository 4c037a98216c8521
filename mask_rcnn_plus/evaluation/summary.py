"""All figures of all classes, as a table for programs."""

import csv
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Of a file's rows: AP and AR are from 0 to 100, nan where there is nothing to find; ARmax is at
# max_dets detections an image, as all the others but AR1 and AR10.
COLUMNS = (
    *("task", "class_id", "class", "AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "ARmax", "ARs", "ARm", "ARl", "max_dets", "objects", "detections"),
)
_AREAS = {"small": "s", "medium": "m", "large": "l"}


def summary_rows(
    coco_eval: Any, task: str, class_names: Sequence[str], detections: Iterable[Any]
) -> list[dict[str, Any]]:
    """A row for all classes together, with the class_id "", then one a class.

    Args:
        coco_eval: a COCO evaluator after ``accumulate``; see coco_scores.py for its arrays.
        task: "bbox", "segm", "boundary" or "keypoints".
        class_names: one for each of ``coco_eval.params.catIds``.
        detections: in COCO's form, of this task.
    """
    params = coco_eval.params
    found = Counter(detection["category_id"] for detection in detections)
    objects = Counter(
        annotation["category_id"]
        for annotation in coco_eval.cocoGt.anns.values()
        if not annotation.get("iscrowd") and (task != "keypoints" or annotation["num_keypoints"])
    )
    every = range(len(params.catIds))
    rows = [{"class_id": "", "class": "all", **_figures(coco_eval, every)}]
    rows[0] |= {"objects": objects.total(), "detections": found.total()}
    for k, (category, name) in enumerate(zip(params.catIds, class_names, strict=True)):
        counts = {"objects": objects[category], "detections": found[category]}
        rows.append({"class_id": category, "class": name, **_figures(coco_eval, [k]), **counts})
    return [{"task": task, **row, "max_dets": params.maxDets[-1]} for row in rows]


def write_summary(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes rows of :func:`summary_rows` as csv, with the columns COLUMNS."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_summary(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of :func:`write_summary`: figures as float, counts as int.

    Raises:
        OSError, ValueError: the file cannot be read, or is another.
    """
    texts = {"task", "class_id", "class"}
    counts = {"max_dets", "objects", "detections"}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns")
        return [
            {
                name: value
                if name in texts
                else int(value)
                if name in counts
                else float(value or math.nan)
                for name, value in row.items()
            }
            for row in reader
        ]


def _figures(coco_eval: Any, classes: Sequence[int]) -> dict[str, float]:
    params = coco_eval.params
    precision = coco_eval.eval["precision"][:, :, list(classes)]
    recall = coco_eval.eval["recall"][:, list(classes)]

    def average(values: np.ndarray) -> float:
        defined = values[values > -1]
        return 100 * float(defined.mean()) if defined.size else math.nan

    at = {iou: np.isclose(params.iouThrs, iou) for iou in (0.5, 0.75)}
    figures = {"AP": average(precision[..., 0, -1])}
    figures |= {f"AP{100 * iou:.0f}": average(precision[t][..., 0, -1]) for iou, t in at.items()}
    for index, area in list(enumerate(params.areaRngLbl))[1:]:
        figures[f"AP{_AREAS[area]}"] = average(precision[..., index, -1])
        figures[f"AR{_AREAS[area]}"] = average(recall[..., index, -1])
    if len(params.maxDets) == 3:
        figures |= {"AR1": average(recall[..., 0, 0]), "AR10": average(recall[..., 0, 1])}
    return {**figures, "ARmax": average(recall[..., 0, -1])}
