"""Computes COCO's metrics and tables from detections.

The accumulated arrays are read here because pycocotools' ``summarize`` returns an AP of -1 if the
limit on detections is not 100.

Letters in shapes: T IoU thresholds, S recall thresholds, K classes, A area ranges, M limits on the
detections of an image. An entry of -1 means that the ground truth lacks such an object.
"""

import contextlib
import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from mask_rcnn_plus.files import replacing

# The columns of summary.csv. AP and AR are from 0 to 100, nan where the ground truth lacks such an
# object. AR1 and AR10 allow 1 and 10 detections per image, all other metrics max_dets.
COLUMNS = (
    *("task", "class_id", "class", "AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "ARmax", "ARs", "ARm", "ARl", "max_dets", "objects", "detections"),
)
_SIZES = {
    "APs": "a small area (below 32 x 32 pixels)",
    "APm": "a medium area (from 32 x 32 to 96 x 96 pixels)",
    "APl": "a large area (above 96 x 96 pixels)",
}


def complete_ground_truth(ground_truth: COCO) -> int:
    """Adds, in place, the keys that COCO's evaluators need and that hand-written files may lack.

    Its annotations need at least "bbox", in (x, y, width, height). The id 0 is replaced.

    Returns:
        the number of keypoints of an object; 0 without keypoints.
    """
    if 0 in ground_truth.anns:
        # The evaluators store each match by its annotation id, and 0 means no match.
        new_id = 1 + max(key for key in ground_truth.anns if isinstance(key, int))
        ground_truth.anns[0]["id"] = new_id
        ground_truth.anns[new_id] = ground_truth.anns.pop(0)
    anns = ground_truth.anns.values()
    num_keypoints = max((len(ann.get("keypoints") or ()) // 3 for ann in anns), default=0)
    for ann in anns:
        ann["iscrowd"] = int(bool(ann.get("iscrowd")))  # some tools write null
        has_area = isinstance(area := ann.get("area"), int | float) and 0 <= area < math.inf
        if not has_area and ann.get("segmentation"):
            ann["area"] = float(mask_util.area(ground_truth.annToRLE(ann)))
        elif not has_area:
            ann["area"] = ann["bbox"][2] * ann["bbox"][3]
        if num_keypoints:
            # As in COCO's own files, an object without keypoints does not count as missed.
            ann["keypoints"] = ann.get("keypoints") or [0] * (3 * num_keypoints)
            ann["num_keypoints"] = sum(visible > 0 for visible in ann["keypoints"][2::3])
    return num_keypoints


def accumulate(
    ground_truth: COCO,
    detections: Sequence[Mapping[str, Any]],
    task: str,
    *,
    max_dets: Sequence[int],
    kpt_oks_sigmas: Sequence[float] = (),
    img_ids: Sequence[Any] | None = None,
    engine: Callable[[COCO, COCO, str], Any] = COCOeval,
) -> Any:
    """Matches detections to the ground truth.

    Args:
        ground_truth: after :func:`complete_ground_truth`.
        detections: in COCO's result format; not changed, may be empty.
        task: "bbox", "segm", "keypoints" or "boundary", which pycocotools' COCOeval lacks.
        max_dets: the limits on the detections of an image, ascending; unused for keypoints.
        kpt_oks_sigmas: one per keypoint; empty uses COCO's.
        img_ids: the images to score; None scores all.
        engine: pycocotools' COCOeval or a faster class with the same interface.

    Returns:
        the engine after ``accumulate``.
    """
    # With a box, pycocotools would use the area of the box as the area of the mask. A shallow copy
    # is enough: loadRes and the engines only add keys to a detection and replace values.
    unused = {"bbox"} if task in ("segm", "boundary") else set()
    copies = [{k: v for k, v in d.items() if k not in unused} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        if copies:
            coco_eval = engine(ground_truth, ground_truth.loadRes(copies), task)
        else:
            # loadRes and the fast engines do not support an empty list.
            empty = COCO()
            empty.dataset = {**ground_truth.dataset, "annotations": []}
            empty.createIndex()
            coco_eval = COCOeval(ground_truth, empty, "segm" if task == "boundary" else task)
        params = coco_eval.params
        params.catIds = sorted(ground_truth.getCatIds())
        if img_ids is not None:
            params.imgIds = list(img_ids)
        if task != "keypoints":
            params.maxDets = list(max_dets)
        elif kpt_oks_sigmas:
            params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
        coco_eval.evaluate()
        coco_eval.accumulate()
    return coco_eval


def _mean(
    params: Any, values: np.ndarray, iou: float | None = None, area: str = "all", limit: int = -1
) -> float:
    """The mean of precision (T, S, K, A, M) or recall (T, K, A, M), from 0 to 1, or nan."""
    values = values[..., params.areaRngLbl.index(area), limit]
    if iou is not None:
        values = values[np.isclose(params.iouThrs, iou)]
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def coco_metrics(coco_eval: Any, classes: Sequence[int] | slice = slice(None)) -> dict[str, float]:
    """COCO's metrics of some classes together.

    Args:
        coco_eval: a COCO evaluator after ``accumulate``; its ``eval`` has "precision"
            (T, S, K, A, M) and "recall" (T, K, A, M).
        classes: indices of ``coco_eval.params.catIds``.

    Returns:
        AP, AP50, AP75 and, for each area range of the task, APs, APm, APl; then AR1, AR10 (not for
        keypoints), ARmax and, for each area range, ARs, ARm, ARl. Each is from 0 to 100, or nan
        where the ground truth lacks such an object.
    """
    params = coco_eval.params
    precision = partial(_mean, params, coco_eval.eval["precision"][:, :, classes])
    recall = partial(_mean, params, coco_eval.eval["recall"][:, classes])
    areas = params.areaRngLbl[1:]
    metrics = {"AP": precision(), "AP50": precision(iou=0.5), "AP75": precision(iou=0.75)}
    metrics |= {f"AP{area[0]}": precision(area=area) for area in areas}
    if len(params.maxDets) == 3:
        metrics |= {"AR1": recall(limit=0), "AR10": recall(limit=1)}
    metrics |= {"ARmax": recall(), **{f"AR{area[0]}": recall(area=area) for area in areas}}
    return {name: 100 * value for name, value in metrics.items()}


def coco_table(coco_eval: Any) -> str:
    """COCO's own table, from 0 to 1: twelve lines for boxes and masks, ten for keypoints."""
    params = coco_eval.params

    def line(kind: str, iou: float | None = None, area: str = "all", limit: int = -1) -> str:
        name = {"AP": "Precision", "AR": "Recall"}[kind]
        value = _mean(params, coco_eval.eval[name.lower()], iou, area, limit)
        ious = f"{params.iouThrs[0]:.2f}:{params.iouThrs[-1]:.2f}" if iou is None else f"{iou:.2f}"
        return (
            f" {f'Average {name}':<18} ({kind}) @[ IoU={ious:<9} | area={area:>6s} | "
            f"maxDets={params.maxDets[limit]:>3d} ] = {value:0.3f}"
        )

    ious, areas = (None, 0.5, 0.75), params.areaRngLbl[1:]
    lines = [line("AP", iou) for iou in ious]
    lines += [line("AP", area=area) for area in areas]
    if len(params.maxDets) == 1:
        lines += [line("AR", iou) for iou in ious]
    else:
        lines += [line("AR", limit=limit) for limit in range(len(params.maxDets))]
    lines += [line("AR", area=area) for area in areas]
    return "\n".join(lines)


def metrics_table(metrics: Mapping[str, float], per_class: Mapping[str, float]) -> str:
    """The metrics in one row and, below it, the AP of each class, three classes per row.

    Args:
        metrics: AP, AP50 and so on.
        per_class: AP by "AP-<class>"; if empty, the second table is missing.
    """
    table = create_small_table(dict(metrics))
    if not per_class:
        return table
    cells = [cell for key, ap in per_class.items() for cell in (key.removeprefix("AP-"), ap)]
    width = min(6, len(cells))
    rows = [cells[start : start + width] for start in range(0, len(cells), width)]
    headers = ["class", "AP"] * (width // 2)
    classes = tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f", numalign="left")
    return f"{table}\n\n{classes}"


def explain_nan(metrics: Mapping[str, float], per_class: Mapping[str, float], what: str) -> str:
    """The reasons why some metrics are nan, one per line; "" if none of them is nan.

    Args:
        metrics, per_class: as for :func:`metrics_table`.
        what: what an object needs in order to count: "box", "mask" or "labelled keypoint".
    """
    if math.isnan(metrics["AP"]):
        return f"all are nan: the ground truth has no object with a {what} (crowds do not count)"
    reasons = [
        f"{name} is nan: the ground truth has no object with {_SIZES[name]}"
        for name, value in metrics.items()
        if math.isnan(value)
    ]
    absent = [name.removeprefix("AP-") for name, value in per_class.items() if math.isnan(value)]
    if absent:
        names = ", ".join(absent)
        reasons.append(f"AP is nan for classes without an object in the ground truth: {names}")
    return "\n".join(reasons)


def summary_rows(
    coco_eval: Any, task: str, class_names: Sequence[str], detections: Iterable[Any]
) -> list[dict[str, Any]]:
    """The rows of summary.csv: one for all classes, with the class_id "", then one per class.

    Args:
        coco_eval: as for :func:`coco_metrics`.
        class_names: one for each of ``coco_eval.params.catIds``.
        detections: in COCO's result format.
    """
    params = coco_eval.params
    detected = Counter(detection["category_id"] for detection in detections)
    objects = Counter(
        annotation["category_id"]
        for annotation in coco_eval.cocoGt.anns.values()
        if not annotation.get("iscrowd") and (task != "keypoints" or annotation["num_keypoints"])
    )
    counts = {"objects": objects.total(), "detections": detected.total()}
    rows = [{"class_id": "", "class": "all", **coco_metrics(coco_eval), **counts}]
    for k, (category, name) in enumerate(zip(params.catIds, class_names, strict=True)):
        counts = {"objects": objects[category], "detections": detected[category]}
        rows.append({"class_id": category, "class": name, **coco_metrics(coco_eval, [k]), **counts})
    return [{"task": task, **row, "max_dets": params.maxDets[-1]} for row in rows]


def write_summary(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes the rows of :func:`summary_rows` to a csv file."""
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def read_summary(path: Path) -> list[dict[str, Any]]:
    """Reads the rows that :func:`write_summary` wrote: metrics as float, counts as int.

    Raises:
        OSError, ValueError: the file cannot be read, or has other columns.
    """
    types: dict[str, Callable[[str], Any]] = dict.fromkeys(("task", "class_id", "class"), str)
    types |= dict.fromkeys(("max_dets", "objects", "detections"), int)
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns")
        return [
            {
                name: types[name](value) if name in types else float(value or math.nan)
                for name, value in row.items()
            }
            for row in reader
        ]
