"""Matches the detections of an evaluation to the ground truth and names each wrong detection.

Letters in shapes: D detections, G objects of the ground truth, T IoU thresholds. Only arrays and
run lengths stay in memory, no images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
from tqdm import tqdm

from mask_rcnn_plus.data.mask_rules import is_number
from mask_rcnn_plus.evaluation.coco_json import segmentation_to_rle

Array = npt.NDArray[Any]

# IoU thresholds of AP; the error types are for the first.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_FOREGROUND, _BACKGROUND = 0.5, 0.1

# The error of a detection. RIGHT matches an object. IGNORED does not count: it matches a crowd or
# exceeds the limit on detections.
IGNORED, RIGHT, CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND = -1, 0, 1, 2, 3, 4, 5


@dataclass
class ObjectTable:
    """The R objects or detections of all images, ordered by image."""

    image: Array  # (R,) index into Analysis.images
    category: Array  # (R,) index into Analysis.class_names
    box: Array  # (R, 4), (x0, y0, x1, y1) in pixels
    mask: list[Mapping[str, Any] | None]  # R run-length encodings; None without a mask
    score: Array  # (R,), of detections
    area: Array  # (R,) in pixels, of the ground truth
    crowd: Array  # (R,) bool, of the ground truth

    def __len__(self) -> int:
        return len(self.image)

    def in_image(self, image: int) -> Array:
        """The indices of an image's objects."""
        return np.arange(*np.searchsorted(self.image, [image, image + 1]))

    def per_image(self, images: int) -> Array:
        """(images,) counts of the objects that are not crowds."""
        return np.bincount(self.image[~self.crowd], minlength=images)


@dataclass
class Matches:
    """The results of matching D detections to G objects, of one image or of all images."""

    right: Array  # (D, T) bool, whether a detection matches an object at each threshold
    ignored: Array  # (D, T) bool, whether a detection does not count at each threshold
    objects: Array  # (D,) index of the object matched at IoU 0.5, or -1
    ious: Array  # (D,) the IoU with that object, or 0
    errors: Array  # (D,) IGNORED, RIGHT, CLASS, ...
    # (D,) index of the object with the highest IoU: for CLASS errors among the objects of other
    # classes, for LOCATION errors among those of the same class; else -1.
    targets: Array
    matched_by: Array  # (G,) index of the detection that matches the object at IoU 0.5, or -1

    @classmethod
    def empty(cls, detections: int, objects: int, error: int) -> "Matches":
        """No match; all detections have this error."""
        return cls(
            right=np.zeros((detections, len(THRESHOLDS)), bool),
            ignored=np.full((detections, len(THRESHOLDS)), error == IGNORED),
            objects=np.full(detections, -1, np.int32),
            ious=np.zeros(detections),
            errors=np.full(detections, error, np.int8),
            targets=np.full(detections, -1, np.int32),
            matched_by=np.full(objects, -1, np.int32),
        )


@dataclass
class Analysis:
    """The detections and objects of an evaluation, and how they match."""

    images: list[Mapping[str, Any]]  # COCO's records, ordered by id
    class_names: Sequence[str]  # by category
    truth: ObjectTable
    detections: ObjectTable
    tasks: dict[str, Matches]  # for "bbox" and, if both tables have masks, for "segm"

    @property
    def main_task(self) -> str:
        """The task used to judge images: "segm" if there are masks, else "bbox"."""
        return "segm" if "segm" in self.tasks else "bbox"

    @property
    def main_matches(self) -> Matches:
        """The matches for the main task."""
        return self.tasks[self.main_task]


def analyse(
    ground_truth: Mapping[str, Any],
    results: Iterable[Mapping[str, Any]],
    *,
    max_dets: int,
    label: str = "",
) -> Analysis:
    """Compares detections with a ground truth.

    Args:
        ground_truth: the content of a COCO json file.
        results: detections in COCO's result format. Unknown images and categories are skipped.
        max_dets: how many detections per image and class count, best scores first.
        label: for the progress bar.
    """
    images = sorted(ground_truth["images"], key=lambda image: image["id"])
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    truth = _table(ground_truth.get("annotations", ()), images, categories)
    detections = _table(results, images, categories)
    has_masks = all(
        not len(table) or any(mask is not None for mask in table.mask)
        for table in (truth, detections)
    )
    names = ["bbox", "segm"] if has_masks and (len(truth) or len(detections)) else ["bbox"]
    tasks = {name: Matches.empty(len(detections), len(truth), IGNORED) for name in names}
    for image in tqdm(range(len(images)), label, unit="image", leave=False, disable=None):
        for name, matches in tasks.items():
            _match_image(matches, name, truth, detections, image, max_dets)
    return Analysis(images, [str(c["name"]) for c in categories], truth, detections, tasks)


def _table(
    entries: Iterable[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
) -> ObjectTable:
    image_index = {image["id"]: i for i, image in enumerate(images)}
    class_index = {category["id"]: k for k, category in enumerate(categories)}
    rows: list[tuple[int, int, float, float, bool]] = []
    boxes: list[Sequence[float]] = []
    masks: list[Mapping[str, Any] | None] = []
    for entry in entries:
        i, k = image_index.get(entry["image_id"]), class_index.get(entry["category_id"])
        if i is None or k is None:
            continue
        mask = None
        if entry.get("segmentation"):
            size = int(images[i]["height"]), int(images[i]["width"])
            mask = segmentation_to_rle(entry["segmentation"], *size)
        box = entry.get("bbox")
        if box is None:
            box = mask_util.toBbox(mask) if mask else (0, 0, 0, 0)
        area = 0.0 if "score" in entry else entry.get("area")
        if not is_number(area):
            area = float(mask_util.area(mask)) if mask else box[2] * box[3]
        score, is_crowd = entry.get("score", 0.0), bool(entry.get("iscrowd", 0))
        rows.append((i, k, score, max(0.0, area), is_crowd))
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
        masks.append(mask)
    columns = zip(*rows, strict=True) if rows else [[]] * 5
    image, category, scores, areas, crowds = map(np.array, columns)
    # COCO's order: by image, then best scores first; equal scores keep the order of the file.
    order = np.lexsort((-scores, image))
    return ObjectTable(
        image=image[order].astype(np.int32),
        category=category[order].astype(np.int32),
        box=np.array(boxes, np.float64).reshape(-1, 4)[order],
        mask=[masks[i] for i in order],
        score=scores[order].astype(np.float64),
        area=areas[order].astype(np.float64),
        crowd=crowds[order].astype(bool),
    )


def _match_image(
    total: Matches,
    task: str,
    truth: ObjectTable,
    detections: ObjectTable,
    image: int,
    max_dets: int,
) -> None:
    """Matches one image and copies the result into ``total``."""
    objects, indices = truth.in_image(image), detections.in_image(image)
    if len(indices) > max_dets:
        classes = detections.category[indices]
        best = [np.flatnonzero(classes == k)[:max_dets] for k in np.unique(classes)]
        indices = indices[np.sort(np.concatenate(best))]
    if not len(indices):
        return
    crowds = truth.crowd[objects]
    ious = np.zeros((len(indices), len(objects)))
    if ious.size:
        if task == "segm":
            height, width = next((m["size"] for i in objects if (m := truth.mask[i])), [1, 1])
            uncompressed = {"size": [height, width], "counts": [height * width]}
            empty = segmentation_to_rle(uncompressed, height, width)
            first: Any = [detections.mask[i] or empty for i in indices]
            second: Any = [truth.mask[i] or empty for i in objects]
        else:
            first, second = (
                np.hstack([box[:, :2], box[:, 2:] - box[:, :2]])
                for box in (detections.box[indices], truth.box[objects])
            )
        ious = np.asarray(mask_util.iou(first, second, crowds.astype(np.uint8)))
    matches = match(ious, detections.category[indices], truth.category[objects], crowds)
    for name in ("right", "ignored", "ious", "errors"):
        getattr(total, name)[indices] = getattr(matches, name)
    for name in ("objects", "targets"):
        index = getattr(matches, name)
        getattr(total, name)[indices[index >= 0]] = objects[index[index >= 0]]
    hit = matches.matched_by >= 0
    total.matched_by[objects[hit]] = indices[matches.matched_by[hit]]


def match(ious: Array, classes: Array, object_classes: Array, crowds: Array) -> Matches:
    """Matches as COCO does: by class, best score first, to the free object of the highest IoU.

    The errors are TIDE's (Bolya et al. 2020, section 2.2). A detection gets the first that
    applies: LOCATION, IoU of 0.1 to 0.5 with an object of its class; CLASS, IoU of at least 0.5
    with an object of another class; DUPLICATE, IoU of at least 0.5 with an object of its class that
    a better score has matched; BACKGROUND, IoU of at most 0.1 with any object; BOTH, all others.

    Args:
        ious: (D, G), rows by falling score; for a crowd, the share of the detection inside it.
        classes: (D,).
        object_classes: (G,).
        crowds: (G,) bool, whether an object is a crowd.
    """
    result = Matches.empty(len(classes), len(object_classes), BACKGROUND)
    if not ious.size:
        return result
    same = classes[:, None] == object_classes[None]
    own = np.where(same & ~crowds, ious, -1.0)
    inside = np.where(same & crowds, ious, -1.0).max(axis=1)
    free = np.ones((len(THRESHOLDS), len(object_classes)), bool)
    for d in np.flatnonzero(own.max(axis=1) >= THRESHOLDS[0]):
        candidates = np.where(free, own[d], -1.0)
        # COCO takes the last of several objects with the same IoU.
        best = candidates.shape[1] - 1 - candidates[:, ::-1].argmax(axis=1)
        value = candidates[np.arange(len(THRESHOLDS)), best]
        hit = value >= THRESHOLDS
        free[hit, best[hit]] = False
        result.right[d] = hit
        if hit[0]:
            result.objects[d], result.ious[d] = best[0], value[0]
            result.matched_by[best[0]] = d
    result.ignored[:] = ~result.right & (inside[:, None] >= THRESHOLDS)

    other = np.where(~same & ~crowds, ious, -1.0)
    best_own, best_other = own.max(axis=1), other.max(axis=1)
    errors = result.errors
    errors[np.maximum(best_own, best_other) > _BACKGROUND] = BOTH
    errors[best_own >= _FOREGROUND] = DUPLICATE
    errors[best_other >= _FOREGROUND] = CLASS
    errors[(best_own >= _BACKGROUND) & (best_own < _FOREGROUND)] = LOCATION
    errors[result.ignored[:, 0]] = IGNORED
    errors[result.right[:, 0]] = RIGHT
    for error, table in ((CLASS, other), (LOCATION, own)):
        chosen = errors == error
        result.targets[chosen] = table[chosen].argmax(axis=1)
    return result
