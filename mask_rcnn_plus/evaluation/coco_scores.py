"""From detections to the figures and tables that COCO users know.

The accumulated arrays are read here rather than by pycocotools' ``summarize``, whose AP is -1 as
soon as the limit on detections is not 100.

Letters in shapes: T IoU thresholds, S recall thresholds, K classes, A area ranges, M limits on the
detections of an image. An entry of -1 means that the ground truth has nothing to find there.
"""

import contextlib
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

_SUFFIX = {"small": "s", "medium": "m", "large": "l"}
_SIZES = {
    "s": "a small area (below 32 x 32 pixels)",
    "m": "a medium area (from 32 x 32 to 96 x 96 pixels)",
    "l": "a large area (above 96 x 96 pixels)",
}


def complete_ground_truth(ground_truth: COCO) -> int:
    """Fills in, in place, what hand-written files leave out and COCO's evaluators index.

    An annotation with the id 0, which those would never count as found, gets another one.

    Args:
        ground_truth: its annotations need "bbox", in (x, y, width, height), at least.

    Returns:
        the number of keypoints an object has, 0 where none has any.
    """
    anns = ground_truth.anns.values()
    if 0 in ground_truth.anns:
        # The evaluators note matches by id, and take 0 for none.
        new_id = 1 + max(key for key in ground_truth.anns if isinstance(key, int))
        ground_truth.anns[0]["id"] = new_id
        ground_truth.anns[new_id] = ground_truth.anns.pop(0)
        anns = ground_truth.anns.values()
    num_keypoints = max((len(ann.get("keypoints") or ()) // 3 for ann in anns), default=0)
    for ann in anns:
        ann.setdefault("iscrowd", 0)
        if "area" not in ann and ann.get("segmentation"):
            ann["area"] = float(mask_util.area(ground_truth.annToRLE(ann)))
        elif "area" not in ann:
            ann["area"] = ann["bbox"][2] * ann["bbox"][3]
        if num_keypoints:
            # An object without any is not counted as missed, as in COCO's own files.
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
        task: "bbox", "segm", "boundary" (which pycocotools' own engine lacks) or "keypoints".
        max_dets: the limits on the detections of an image, ascending; not used for keypoints.
        kpt_oks_sigmas: one a keypoint, empty for COCO's.
        img_ids: the images to score, None for all.
        engine: pycocotools' COCOeval or a faster one with its interface.

    Returns:
        the engine after ``accumulate``.
    """
    # The box goes: with it pycocotools would take a mask's size to be that of its box. One level
    # of copies is enough: loadRes and the engines add keys to a detection, and replace values.
    left_out = {"bbox"} if task in ("segm", "boundary") else set()
    copies = [{k: v for k, v in d.items() if k not in left_out} for d in detections]
    with contextlib.redirect_stdout(io.StringIO()):
        if copies:
            coco_eval = engine(ground_truth, ground_truth.loadRes(copies), task)
        else:
            # loadRes takes no empty list, and the fast engines were not made for one.
            found = COCO()
            found.dataset = {**ground_truth.dataset, "annotations": []}
            found.createIndex()
            coco_eval = COCOeval(ground_truth, found, "segm" if task == "boundary" else task)
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


def _mean(values: npt.NDArray[np.float64]) -> float:
    """The mean of what is defined, nan where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _precision(coco_eval: Any, iou: float | None = None, area: str = "all") -> float:
    """Average precision, from 0 to 1, over all thresholds and classes, at the largest limit."""
    values = coco_eval.eval["precision"][..., coco_eval.params.areaRngLbl.index(area), -1]
    if iou is not None:
        values = values[np.isclose(coco_eval.params.iouThrs, iou)]
    return _mean(values)


def _recall(coco_eval: Any, iou: float | None = None, area: str = "all", limit: int = -1) -> float:
    """Average recall, from 0 to 1, over all thresholds and classes, at ``maxDets[limit]``."""
    values = coco_eval.eval["recall"][..., coco_eval.params.areaRngLbl.index(area), limit]
    if iou is not None:
        values = values[np.isclose(coco_eval.params.iouThrs, iou)]
    return _mean(values)


def coco_figures(coco_eval: Any) -> dict[str, float]:
    """The figures that detectron2 reports.

    Args:
        coco_eval: a COCO evaluator after ``accumulate``; its ``eval`` has "precision"
            (T, S, K, A, M) and "recall" (T, K, A, M).

    Returns:
        AP, AP50, AP75 and, for each area range that was evaluated, APs, APm, APl; each from 0 to
        100, or nan where the ground truth has no such object.
    """
    figures = {
        "AP": _precision(coco_eval),
        "AP50": _precision(coco_eval, iou=0.5),
        "AP75": _precision(coco_eval, iou=0.75),
    }
    for area in coco_eval.params.areaRngLbl[1:]:
        figures["AP" + _SUFFIX[area]] = _precision(coco_eval, area=area)
    return {name: 100 * value for name, value in figures.items()}


def class_figures(coco_eval: Any, class_names: Sequence[str]) -> dict[str, float]:
    """Average precision of each class, over all IoU thresholds and areas.

    Args:
        coco_eval: as for :func:`coco_figures`.
        class_names: K names, in the order of ``coco_eval.params.catIds``.

    Returns:
        "AP-<class>" for each of them, from 0 to 100, or nan where there is no object of the class.
    """
    precision = coco_eval.eval["precision"]
    return {
        f"AP-{name}": 100 * _mean(precision[:, :, k, 0, -1]) for k, name in enumerate(class_names)
    }


def coco_table(coco_eval: Any) -> str:
    """COCO's own table: twelve lines for boxes and masks, ten for keypoints.

    Args:
        coco_eval: as for :func:`coco_figures`.

    Returns:
        the lines, with values from 0 to 1, or nan.
    """
    params = coco_eval.params
    everything = f"{params.iouThrs[0]:.2f}:{params.iouThrs[-1]:.2f}"

    def line(kind: str, value: float, iou: float | None, area: str, limit: int) -> str:
        title = {"AP": "Average Precision", "AR": "Average Recall"}[kind]
        at = everything if iou is None else f"{iou:.2f}"
        most = params.maxDets[limit]
        return (
            f" {title:<18} ({kind}) @[ IoU={at:<9} | area={area:>6s} | maxDets={most:>3d} ] = "
            f"{value:0.3f}"
        )

    keypoints = len(params.maxDets) == 1
    ious, areas = (None, 0.5, 0.75), params.areaRngLbl[1:]
    lines = [line("AP", _precision(coco_eval, iou), iou, "all", -1) for iou in ious]
    lines += [line("AP", _precision(coco_eval, None, area), None, area, -1) for area in areas]
    if keypoints:
        lines += [line("AR", _recall(coco_eval, iou), iou, "all", -1) for iou in ious]
    else:
        for limit in range(len(params.maxDets)):
            value = _recall(coco_eval, limit=limit)
            lines.append(line("AR", value, None, "all", limit))
    lines += [line("AR", _recall(coco_eval, None, area), None, area, -1) for area in areas]
    return "\n".join(lines)


def figures_table(figures: Mapping[str, float], per_class: Mapping[str, float]) -> str:
    """The figures in one row and, below it, those of the classes, three to a row.

    Args:
        figures: from :func:`coco_figures`, at least one.
        per_class: from :func:`class_figures`; empty leaves the second table out.
    """
    table = create_small_table(dict(figures))
    if not per_class:
        return table
    cells = [(name.removeprefix("AP-"), value) for name, value in per_class.items()]
    columns = min(3, len(cells))
    rows = [
        list(itertools.chain(*cells[start : start + columns]))
        for start in range(0, len(cells), columns)
    ]
    headers = ["class", "AP"] * columns
    classes = tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f", numalign="left")
    return f"{table}\n\n{classes}"


def explain_nan(figures: Mapping[str, float], per_class: Mapping[str, float], what: str) -> str:
    """Why some figures are nan, for the log.

    Args:
        figures: from :func:`coco_figures`.
        per_class: from :func:`class_figures`.
        what: what an object must have to count: "box", "mask" or "labelled keypoints".

    Returns:
        one line a reason; empty where nothing is nan.
    """
    if math.isnan(figures["AP"]):
        return f"all are nan: the ground truth has no object with a {what} (crowds do not count)"
    reasons = [
        f"{name} is nan: the ground truth has no object with {_SIZES[name[-1]]}"
        for name, value in figures.items()
        if math.isnan(value)
    ]
    absent = [name.removeprefix("AP-") for name, value in per_class.items() if math.isnan(value)]
    if absent:
        names = ", ".join(absent)
        reasons.append(f"AP is nan for classes without an object in the ground truth: {names}")
    return "\n".join(reasons)
