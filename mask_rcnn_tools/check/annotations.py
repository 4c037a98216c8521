"""Checks flags, keypoints and duplicates of annotations. json_checks.py checks boxes and masks."""

import reprlib
from collections.abc import Sequence
from typing import Any

from mask_rcnn_plus.data.coco_json import (
    crowd_flag,
    is_names,
    keypoint_conflict,
    keypoint_metadata,
)
from mask_rcnn_plus.data.mask_rules import are_numbers, is_number
from mask_rcnn_tools.check.masks import segmentation_kind
from mask_rcnn_tools.check.problems import Annotations, Problem, is_key

_show = reprlib.repr
# The most annotations with the same box that are compared with each other: a hostile json could
# give all annotations the same box.
_MAX_COMPARED = 20


def check_flags(annotations: Annotations) -> None:
    """Checks ``iscrowd``, ``ignore`` and ``area``."""
    for index, annotation in enumerate(annotations.entries):
        crowd, ignore, area = (annotation.get(key, 0) for key in ("iscrowd", "ignore", "area"))
        if "iscrowd" not in annotation:
            annotations.add_problem("crowd-missing", index)
        elif type(crowd) is not int or crowd_flag(crowd) is None:
            kind = "crowd-flag" if crowd_flag(crowd) is None else "crowd-type"
            annotations.add_problem(kind, index, f"has the iscrowd {_show(crowd)}")
        if ignore != 0:
            annotations.add_problem("ignore", index, f"has the ignore {_show(ignore)}")
        if "area" not in annotation:
            annotations.add_problem("area-missing", index)
        elif not is_number(area, 1e12) or area < 0:
            annotations.add_problem("area", index, f"has the area {_show(area)}")


def check_crowds(annotations: Annotations) -> None:
    """Counts the crowds, which training leaves out, and finds those that are single objects."""
    brushes = brush_masks(annotations.entries)
    for index, entry in enumerate(annotations.entries):
        if crowd_flag(entry.get("iscrowd")) == 1:
            annotations.add_problem("crowd-brush" if index in brushes else "crowd", index)


def brush_masks(entries: Sequence[dict[str, Any]]) -> set[int]:
    """The indices of the annotations that are crowds only because CVAT exports brush masks so.

    CVAT exports each brush mask as a crowd, but no polygon. So a crowd with an RLE counts as an
    object if all RLEs of the json are crowds, and either it has CVAT's ``attributes`` with
    ``occluded``, or all annotations of the json are crowds.
    """
    crowds = {i for i, entry in enumerate(entries) if crowd_flag(entry.get("iscrowd")) == 1}
    if not crowds:
        return set()
    kinds = [segmentation_kind(entry.get("segmentation")) for entry in entries]
    if not crowds.issuperset(index for index, kind in enumerate(kinds) if kind == "rle"):
        return set()
    attributes = {index: entries[index].get("attributes") for index in crowds}
    return {
        index
        for index, fields in attributes.items()
        if kinds[index] == "rle"
        and (len(crowds) == len(entries) or (isinstance(fields, dict) and "occluded" in fields))
    }


def check_keypoints(annotations: Annotations) -> list[str]:
    """Checks what a keypoint model needs: one list of names, with left and right, for all objects.

    Returns:
        the names; [] if there are no keypoints, no names, or different lists of names.
    """
    entries = annotations.entries
    with_points = [
        bool(points := entry.get("keypoints")) and not keypoints_fault(points, None)
        for entry in entries
    ]
    if not any(with_points):
        return []
    for index, entry in enumerate(entries):
        if not entry.get("keypoints") and not is_crowd(entry):
            annotations.add_problem("keypoints-missing", index)
    used = {entry["category_id"] for entry, has in zip(entries, with_points, strict=True) if has}
    categories = annotations.problems.content["categories"]
    annotated = [
        c for c in categories if isinstance(c, dict) and is_key(c.get("id")) and c["id"] in used
    ]
    items = annotations.problems.items
    if conflict := keypoint_conflict(annotated):
        items.append(Problem("keypoints-differ", detail=conflict))
        return []
    metadata = keypoint_metadata(annotated)
    names: list[str] = metadata.get("keypoint_names", [])
    if "keypoint_flip_map" not in metadata:
        detail = f"the keypoints are {', '.join(names)[:200]}" if names else "they have no names"
        items.append(Problem("keypoints-sides", detail=detail))
    return names


def keypoints_fault(keypoints: Any, names: Any) -> str:
    """The fault of an annotation's keypoints, as the end of a sentence; "" if they are valid.

    Args:
        keypoints: of the annotation.
        names: the keypoint names of its category; None to ignore them.
    """
    if keypoints is None or keypoints == []:
        return ""
    if not are_numbers(keypoints):
        return f"has the keypoints {_show(keypoints)}, which are not a list of numbers"
    if not all(is_number(value, 1e6) for value in keypoints):
        return "has a keypoint that is NaN, infinite or extremely large"
    if len(keypoints) % 3:
        return f"has {len(keypoints)} numbers as keypoints, which is not a multiple of 3"
    if names and is_names(names) and len(keypoints) != 3 * len(names):
        return f"has {len(keypoints) // 3} keypoints, but its category names {len(names)}"
    return ""


def check_duplicates(annotations: Annotations) -> None:
    """Finds annotations with the image, category, box, mask and keypoints of an earlier one."""
    seen: dict[Any, list[int]] = {}
    for index, annotation in enumerate(annotations.entries):
        box: Any = annotation.get("bbox")
        if not are_numbers(box):
            continue
        earlier = seen.setdefault((annotation["image_id"], annotation["category_id"], *box), [])
        for other in earlier:
            first = annotations.entries[other]
            if all(first.get(key) == annotation.get(key) for key in ("segmentation", "keypoints")):
                detail = f"repeats annotations[{annotations.positions[other]}]"
                annotations.add_problem("twin", index, detail)
                break
        else:
            if len(earlier) < _MAX_COMPARED:
                earlier.append(index)


def is_crowd(annotation: dict[str, Any]) -> bool:
    """Whether an annotation is a crowd. One with an invalid ``iscrowd`` counts as a crowd."""
    return crowd_flag(annotation.get("iscrowd")) != 0
