"""Boxes, areas and crowd flags of all annotations; exact repetitions."""

import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mask_rcnn_tools.check.masks import place_in_image
from mask_rcnn_tools.check.problems import Findings
from mask_rcnn_tools.check.structure import Objects

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

_show = reprlib.repr
# A box may differ from its mask's by so many pixels, or by such a part of its longer side.
_PIXELS, _PART = 2.0, 0.05
# Without masks, boxes are read as another format only if all of them can be, and at least so many
# (and such a part) make no sense otherwise.
_SOME, _SHARE = 3, 0.1
_COMPARED = 20  # masks of one and the same box, at most: a hostile json could have all so


def check_boxes(findings: Findings, objects: Objects, masks: Floats) -> Floats:
    """Checks the boxes.

    Args:
        findings: gets the problems.
        objects: N annotations.
        masks: (N, 4): x0, y0, x1, y1 around each one's mask, in pixels; NaN without one.

    Returns:
        (N, 4): x, y, width, height as the json has them; NaN where it has no such thing.
    """
    boxes = _read(findings, objects)

    def add(kind: str, which: Flags, detail: str) -> None:
        for place in np.flatnonzero(which):
            box, size = objects.annotations[place]["bbox"], objects.sizes[place]
            image = f", and its image is {size[1]} x {size[0]}" if size else ""
            findings.add(
                kind, "annotations", objects.indices[place], f"has the bbox {box}{detail}{image}"
            )

    with np.errstate(invalid="ignore", over="ignore"):
        finite = np.isfinite(boxes).all(1)
        corners, normalised = _other_formats(boxes, objects.sizes, masks)
        add("box-xyxy", corners, "")
        add("box-normalised", normalised & ~corners, "")
        rest = finite & ~corners & ~normalised
        negative = rest & (boxes[:, 2:] < 0).any(1)
        add("box-negative", negative, "")
        empty = rest & ~negative & (boxes[:, 2:] == 0).any(1)
        add("box-empty", empty, "")
        rest &= ~negative & ~empty
        extents = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        outside, over = place_in_image(extents, objects.sizes)
        add("box-outside", rest & outside, "")
        add("box-over-edge", rest & over, "")
        differs = rest & ~outside & ~_agree(extents, masks)
        for place in np.flatnonzero(differs):
            x0, y0, x1, y1 = masks[place].tolist()
            detail = (
                f"has the bbox {objects.annotations[place]['bbox']}, and its mask the box "
                f"[{x0:g}, {y0:g}, {x1 - x0:g}, {y1 - y0:g}]"
            )
            findings.add("box-mask", "annotations", objects.indices[place], detail)
    return boxes


def _read(findings: Findings, objects: Objects) -> Floats:
    values: list[float] = []
    bad = [np.nan] * 4
    for index, annotation in zip(objects.indices, objects.annotations, strict=True):
        box = annotation.get("bbox")
        if type(box) is list and len(box) == 4 and set(map(type, box)) <= {int, float}:
            # Also true of a NaN: none of the comparisons is.
            if not all(-1e9 < value < 1e9 for value in box):
                findings.add("box-nan", "annotations", index, f"has the bbox {_show(box)}")
                box = bad
            values += box
        else:
            detail = f"has the bbox {_show(box)}" if "bbox" in annotation else "has no 'bbox'"
            findings.add("box-type", "annotations", index, detail)
            values += bad
    return np.array(values, np.float64).reshape(-1, 4)


def _other_formats(
    boxes: Floats, sizes: list[tuple[int, int] | None], masks: Floats
) -> tuple[Flags, Flags]:
    """Which boxes are [x0, y0, x1, y1], and which are fractions of the image."""
    none = np.zeros(len(boxes), bool)
    sides = np.array([size or (np.nan, np.nan) for size in sizes], np.float64).reshape(-1, 2)
    scale = sides[:, [1, 0, 1, 0]]
    extents = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    has_mask = _all(np.isfinite(masks))
    wrong = has_mask & ~_agree(extents, masks)
    corners: Flags = wrong & _agree(boxes, masks)
    normalised: Flags = wrong & _all(boxes <= 1) & _agree(extents * scale, masks)
    if has_mask.any() or not len(boxes):
        return corners, normalised

    known: Flags = _all(np.isfinite(boxes)) & _all(np.isfinite(sides))
    if not known.any():
        return none, none
    fractions = _all(boxes >= 0) & _all(boxes <= 1) & (scale.min(1) > 2)
    if fractions[known].all() and known.sum() > 0:
        return none, known
    ordered = _all(boxes[:, 2:] > boxes[:, :2]) & _all(boxes <= scale + 1)
    beyond = ~_all(extents[:, 2:] <= scale[:, :2] + 1)
    many = beyond[known].sum() >= max(_SOME, _SHARE * known.sum())
    return (known if ordered[known].all() and many else none), none


def _all(flags: npt.NDArray[np.bool_]) -> Flags:
    """Of each row, whether all are true."""
    return np.logical_and.reduce(flags, axis=1)


def _agree(boxes: Floats, masks: Floats) -> Flags:
    """Whether boxes are as good as their masks'; true without a mask."""
    longer = np.maximum(masks[:, 2] - masks[:, 0], masks[:, 3] - masks[:, 1])
    allowed = np.maximum(_PIXELS, _PART * longer)
    differences = np.abs(boxes - masks).max(1)
    return ~(differences > allowed)


def check_flags(findings: Findings, objects: Objects) -> None:
    """Checks ``iscrowd``, ``ignore`` and ``area``."""
    for index, annotation in zip(objects.indices, objects.annotations, strict=True):
        if "iscrowd" not in annotation:
            findings.add("crowd-missing", "annotations", index)
        else:
            crowd = annotation["iscrowd"]
            if type(crowd) is not int or not 0 <= crowd <= 1:
                findings.add("crowd-flag", "annotations", index, f"has the iscrowd {_show(crowd)}")
        ignore = annotation.get("ignore", 0)
        if ignore != 0:
            findings.add("ignore", "annotations", index, f"has the ignore {_show(ignore)}")
        if "area" not in annotation:
            findings.add("area-missing", "annotations", index)
        else:
            area = annotation["area"]
            if type(area) not in (int, float) or not 0 <= area < 1e12:
                findings.add("area", "annotations", index, f"has the area {_show(area)}")


def check_twins(findings: Findings, objects: Objects) -> None:
    """Finds annotations that repeat an earlier one: image, category, box and mask."""
    seen: dict[Any, list[int]] = {}
    for place, annotation in enumerate(objects.annotations):
        box = annotation.get("bbox")
        if type(box) is not list or not set(map(type, box)) <= {int, float}:
            continue
        key = (annotation["image_id"], annotation["category_id"], *box)
        earlier = seen.setdefault(key, [])
        for other in earlier:
            first = objects.annotations[other]
            if first.get("segmentation") == annotation.get("segmentation") and first.get(
                "keypoints"
            ) == annotation.get("keypoints"):
                detail = f"repeats annotations[{objects.indices[other]}]"
                findings.add("twin", "annotations", objects.indices[place], detail)
                break
        else:
            if len(earlier) < _COMPARED:
                earlier.append(place)
