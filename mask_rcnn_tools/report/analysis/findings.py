"""One pass over the images of an evaluation: each detection and each object, and what they match.

Arrays of numbers and run lengths stay in memory, images do not come into it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from mask_rcnn_tools.report.analysis.matching import THRESHOLDS, Array, match

_BITS = 1 << np.arange(len(THRESHOLDS), dtype=np.uint16)


@dataclass
class Objects:
    """Boxes with what else is known of them, one an entry, ordered by image.

    Attributes:
        image: (R,) index into ``Findings.images``.
        category: (R,) index into ``Findings.class_names``.
        box: (R, 4), (x0, y0, x1, y1) in pixels.
        mask: R run lengths, or None where there is no mask.
        score: (R,), of detections.
        area: (R,) in pixels, of the ground truth.
        crowd: (R,) bool, of the ground truth.
    """

    image: Array
    category: Array
    box: Array
    mask: list[dict[str, Any] | None]
    score: Array
    area: Array
    crowd: Array

    def __len__(self) -> int:
        return len(self.image)

    def of(self, image: int) -> slice:
        """Where the objects of an image are."""
        start, stop = np.searchsorted(self.image, [image, image + 1])
        return slice(int(start), int(stop))


@dataclass
class Task:
    """What became of the detections of all images for "bbox" or "segm"; see ``Matches``.

    Attributes:
        right: (R,) uint16, bit t set where the detection is right at THRESHOLDS[t].
        ignored: (R,) uint16, the same for what counts neither way.
        found: (R,) index of the object matched at IoU 0.5, or -1.
        iou: (R,) with it.
        error: (R,) int8.
        target: (R,) index of an object, or -1.
        found_by: (S,) of each object, the index of the detection that matches it at 0.5, or -1.
    """

    right: Array
    ignored: Array
    found: Array
    iou: Array
    error: Array
    target: Array
    found_by: Array


@dataclass
class Findings:
    """The detections, the objects and the matches of an evaluation.

    Attributes:
        images: COCO's records, ordered by id.
        class_names: by category.
        truth, detections: of all images.
        tasks: "bbox", and "segm" where both sides have masks.
    """

    images: list[Mapping[str, Any]]
    class_names: Sequence[str]
    truth: Objects
    detections: Objects
    tasks: dict[str, Task] = field(default_factory=dict)

    @property
    def main_task(self) -> str:
        """The task by which images are judged: masks where there are any."""
        return "segm" if "segm" in self.tasks else "bbox"


def analyse(
    ground_truth: Mapping[str, Any],
    results: Iterable[Mapping[str, Any]],
    *,
    max_dets: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> Findings:
    """Compares detections with a ground truth.

    Args:
        ground_truth: of a COCO json file.
        results: detections in COCO's result format; those of unknown images and categories are
            left out.
        max_dets: how many of an image and class count, best scores first.
        progress: called with 1 after each image.
    """
    images = sorted(ground_truth["images"], key=lambda image: image["id"])
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    places = {image["id"]: i for i, image in enumerate(images)}
    kinds = {category["id"]: k for k, category in enumerate(categories)}
    truth = _collect(ground_truth.get("annotations", ()), places, kinds, images)
    detections = _collect(results, places, kinds, images)
    findings = Findings(images, [str(c["name"]) for c in categories], truth, detections)
    masks = any(mask is not None for mask in truth.mask) or not len(truth)
    masks &= any(mask is not None for mask in detections.mask) or not len(detections)
    names = ["bbox", "segm"] if masks and (len(truth) or len(detections)) else ["bbox"]
    for name in names:
        findings.tasks[name] = _empty(len(detections), len(truth))
    for image in range(len(images)):
        for name, task in findings.tasks.items():
            _match_image(task, name, truth, detections, image, max_dets)
        progress(1)
    return findings


def _collect(
    entries: Iterable[Mapping[str, Any]],
    places: Mapping[Any, int],
    kinds: Mapping[Any, int],
    images: Sequence[Mapping[str, Any]],
) -> Objects:
    rows: list[tuple[int, int, float, float, bool]] = []
    boxes: list[Sequence[float]] = []
    masks: list[dict[str, Any] | None] = []
    for entry in entries:
        image, kind = places.get(entry["image_id"]), kinds.get(entry["category_id"])
        if image is None or kind is None:
            continue
        mask = _run_lengths(entry.get("segmentation"), images[image])
        box = entry.get("bbox")
        if box is None:
            box = mask_util.toBbox(mask) if mask else (0, 0, 0, 0)
        area = entry.get("area")
        if area is None and "score" not in entry:
            area = float(mask_util.area(mask)) if mask else box[2] * box[3]
        crowd = bool(entry.get("iscrowd", 0))
        rows.append((image, kind, entry.get("score", 0.0), area or 0.0, crowd))
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
        masks.append(mask)
    image, category, score, area, crowd = (
        np.array(column) for column in (zip(*rows, strict=True) if rows else [[]] * 5)
    )
    # By image, best scores first, and of equals the first in the file: COCO's order.
    order = np.lexsort((-score, image))
    return Objects(
        image=image[order].astype(np.int32),
        category=category[order].astype(np.int32),
        box=np.array(boxes, np.float64).reshape(-1, 4)[order],
        mask=[masks[i] for i in order],
        score=score[order].astype(np.float64),
        area=area[order].astype(np.float64),
        crowd=crowd[order].astype(bool),
    )


def _run_lengths(segmentation: Any, image: Mapping[str, Any]) -> dict[str, Any] | None:
    if not segmentation:
        return None
    height, width = int(image["height"]), int(image["width"])
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    counts = segmentation["counts"]
    if isinstance(counts, list):
        return mask_util.frPyObjects(segmentation, height, width)
    return {
        "size": segmentation["size"],
        "counts": counts.encode() if isinstance(counts, str) else counts,
    }


def _empty(detections: int, objects: int) -> Task:
    return Task(
        right=np.zeros(detections, np.uint16),
        ignored=np.zeros(detections, np.uint16),
        found=np.full(detections, -1, np.int32),
        iou=np.zeros(detections, np.float32),
        # What passes COCO's limit on detections counts neither way.
        error=np.full(detections, -1, np.int8),
        target=np.full(detections, -1, np.int32),
        found_by=np.full(objects, -1, np.int32),
    )


def _match_image(
    task: Task, name: str, truth: Objects, detections: Objects, image: int, max_dets: int
) -> None:
    objects, found = truth.of(image), detections.of(image)
    classes = detections.category[found]
    kept = found.start + _within_limit(classes, max_dets)
    over = np.setdiff1d(np.arange(found.start, found.stop), kept)
    task.ignored[over] = _BITS.sum()
    if not len(kept):
        return
    classes = detections.category[kept]
    crowds = truth.crowd[objects]
    ious = np.zeros((len(kept), objects.stop - objects.start))
    if ious.size:
        if name == "segm":
            first: Any = [_or_empty(detections.mask[i], truth, objects) for i in kept]
            second: Any = [_or_empty(mask, truth, objects) for mask in truth.mask[objects]]
        else:
            first, second = _xywh(detections.box[kept]), _xywh(truth.box[objects])
        ious = np.asarray(mask_util.iou(first, second, crowds.astype(np.uint8)))
    matches = match(ious, classes, truth.category[objects], crowds)
    task.right[kept] = matches.right @ _BITS
    task.ignored[kept] = matches.ignored @ _BITS
    task.iou[kept] = matches.ious
    task.error[kept] = matches.errors
    for all_, some in ((task.found, matches.objects), (task.target, matches.targets)):
        all_[kept] = np.where(some >= 0, some + objects.start, -1)
    hit = matches.objects >= 0
    task.found_by[objects.start + matches.objects[hit]] = kept[hit]


def _within_limit(classes: Array, max_dets: int) -> Array:
    """The places of the first ``max_dets`` of each class."""
    if len(classes) <= max_dets:
        return np.arange(len(classes))
    parts = [np.flatnonzero(classes == k)[:max_dets] for k in np.unique(classes)]
    return np.sort(np.concatenate(parts))


def _xywh(boxes: Array) -> Array:
    return np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])


def _or_empty(mask: dict[str, Any] | None, truth: Objects, objects: slice) -> dict[str, Any]:
    if mask is not None:
        return mask
    sized = next((m for m in truth.mask[objects] if m is not None), None)
    size = sized["size"] if sized else [1, 1]
    return mask_util.frPyObjects({"size": size, "counts": [size[0] * size[1]]}, *size)
