"""Repairs the content of a json: corrects what can be known, removes what cannot be used."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mask_rcnn_plus.data.coco_json import is_whole, lenient_flag
from mask_rcnn_plus.data.mask_rules import are_numbers
from mask_rcnn_tools.check.forms import to_coco
from mask_rcnn_tools.check.json_checks import inspect
from mask_rcnn_tools.check.masks import (
    Size,
    measure_polygons,
    measure_rles,
    segmentation_kind,
)
from mask_rcnn_tools.check.problems import KINDS, Problem, is_error, is_key
from mask_rcnn_tools.check.result import counted

_PASSES = 6  # a repair may reveal a problem that another one has hidden
_SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Repaired:
    """A repaired json.

    Attributes:
        content: the json's content.
        changes: number of repaired problems of each kind.
        before, after: number of entries in each list.
        left: the errors that remain.
    """

    content: dict[str, Any]
    changes: Counter[str]
    before: dict[str, int]
    after: dict[str, int]
    left: list[Problem]

    def text(self) -> str:
        """The content as JSON."""
        return json.dumps(self.content)

    def lost(self) -> str:
        """What happened to a json that lost all its images or annotations; "" if it keeps some."""
        for section in ("images", "annotations"):
            if self.before[section] and not self.after[section]:
                return f"would keep 0 of {self.before[section]} {section} ({counted(self.changes)})"
        return ""

    def summary(self) -> str:
        """The changes, on one line."""
        counts = ", ".join(
            f"{self.after[section]} of {self.before[section]} {section}" for section in _SECTIONS
        )
        return f"keeps {counts}; repaired: {counted(self.changes) or 'nothing'}"


def repair_content(
    content: dict[str, Any],
    problems: Iterable[Problem],
    sizes: Mapping[int, Size],
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Repaired:
    """Repairs the content of a json.

    Args:
        content: has the three lists of the COCO format; it is changed in place.
        problems: all problems that the check has found, also those of image files.
        sizes: (height, width) of the readable image files, by the image's position.
        renamed: file_name -> path of the file, of images with another name.

    Returns:
        the repaired content; a second check finds no error in it except for those in ``left``.
    """
    before = {section: len(content[section]) for section in _SECTIONS}
    changes: Counter[str] = Counter()
    current = list(problems)
    for problem in current:
        if problem.kind == "file-renamed":
            content["images"][problem.position]["file_name"] = renamed[problem.file_name]
            changes[problem.kind] += 1
    current = [problem for problem in current if problem.kind != "file-renamed"]
    for _ in range(_PASSES):
        repaired = _Pass(content, sizes).run(current)
        changes += repaired
        sizes = {}  # they have been applied, and the positions have changed
        current = inspect(content).problems
        if not repaired:
            break
    after = {section: len(content[section]) for section in _SECTIONS}
    return Repaired(content, changes, before, after, list(filter(is_error, current)))


class _Pass:
    """Repairs each problem of a list once."""

    def __init__(self, content: dict[str, Any], sizes: Mapping[int, Size]) -> None:
        self._content = content
        self._sizes = sizes
        self._removed: dict[str, set[int]] = {section: set() for section in _SECTIONS}
        # The first image with each id.
        self._images = {i["id"]: i for i in reversed(content["images"]) if _has_id(i)}
        self._categories = {c["id"] for c in content["categories"] if _has_id(c)}
        self._next_id: dict[str, int] = {}

    def run(self, problems: Iterable[Problem]) -> Counter[str]:
        """Repairs the problems; returns how many of each kind."""
        changes: Counter[str] = Counter()
        invalid_ids: set[str] = set()
        seen: set[tuple[str, str, int]] = set()
        for problem in problems:
            key = (problem.kind, problem.section, problem.position)
            if not KINDS[problem.kind].repair or not problem.section:
                continue
            changes[problem.kind] += 1
            if problem.kind == "id-type":
                invalid_ids.add(problem.section)
            elif key not in seen and problem.position not in self._removed[problem.section]:
                seen.add(key)
                if not self._repair(problem):
                    self._removed[problem.section].add(problem.position)
        self._remove_entries()
        for section in sorted(invalid_ids):
            self._number(section)
        return changes

    def _repair(self, problem: Problem) -> bool:
        """Repairs an entry; returns whether it stays."""
        kind = problem.kind
        entry = self._content[problem.section][problem.position]
        if kind.startswith("id-") and problem.section == "annotations":
            entry["id"] = self._new_id("annotations")
            return True
        if kind in ("unknown-image", "unknown-category"):
            return self._correct_reference(entry, kind.removeprefix("unknown-") + "_id")
        if kind in ("file-size", "image-field"):
            return self._correct_size(problem.position, entry)
        if kind not in _REPAIRS:
            return False
        image_id = entry.get("image_id")
        image = self._images.get(image_id, {}) if is_key(image_id) else {}
        return not _REPAIRS[kind](entry, image)

    def _new_id(self, section: str) -> int:
        if section not in self._next_id:
            ids: list[Any] = [e.get("id") for e in self._content[section] if isinstance(e, dict)]
            highest = max((i for i in ids if is_whole(i) and i > 0), default=0)
            # Close to the largest possible id, start in a free range below it.
            self._next_id[section] = highest if highest <= 2**62 else 2**53
        self._next_id[section] += 1
        return self._next_id[section]

    def _correct_reference(self, annotation: dict[str, Any], field: str) -> bool:
        """Changes a reference "5" to 5, if that id exists."""
        number = _as_int(annotation.get(field))
        known = self._images if field == "image_id" else self._categories
        if number is None or not (number in known or str(number) in known):
            return False
        annotation[field] = number
        return True

    def _correct_size(self, position: int, image: dict[str, Any]) -> bool:
        """Sets an image's size to that of its file, if all its annotations fit into it."""
        size = self._sizes.get(position)
        if size is None or not isinstance(image.get("file_name"), str):
            return False
        for annotation in self._content["annotations"]:
            if not isinstance(annotation, dict) or annotation.get("image_id") != image.get("id"):
                continue
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict):
                if segmentation.get("size") != list(size):
                    return False
                continue
            extent = None
            if segmentation_kind(segmentation) == "polygons":
                extent, _ = _measure_mask(annotation, size)
            extent = extent or _box_corners(annotation.get("bbox"))
            if extent and not (extent[2] <= size[1] + 1 and extent[3] <= size[0] + 1):
                return False
        image["height"], image["width"] = size
        return True

    def _remove_entries(self) -> None:
        ids = {image["id"] for image in self._content["images"] if _has_id(image)}
        self._filter("images")
        # The annotations of a removed image stay if another image has the same id.
        gone = ids - {image["id"] for image in self._content["images"] if _has_id(image)}
        for position, annotation in enumerate(self._content["annotations"]):
            key = annotation.get("image_id") if isinstance(annotation, dict) else None
            if is_key(key) and key in gone:
                self._removed["annotations"].add(position)
        self._filter("annotations")
        self._filter("categories")

    def _filter(self, section: str) -> None:
        self._content[section][:] = [
            entry
            for position, entry in enumerate(self._content[section])
            if position not in self._removed[section]
        ]

    def _number(self, section: str) -> None:
        """Replaces ids that are not whole numbers, also where annotations refer to them."""
        entries = [entry for entry in self._content[section] if isinstance(entry, dict)]
        used = {entry["id"] for entry in entries if is_whole(entry.get("id"))}
        new: dict[Any, int] = {}
        for entry in entries:
            old = entry.get("id")
            if is_whole(old):
                continue
            if not is_key(old):
                entry["id"] = self._new_id(section)
                continue
            if old not in new:
                number = _as_int(old)
                if number is None or number in used or (section == "annotations" and number == 0):
                    number = self._new_id(section)
                new[old] = number
                used.add(number)
            entry["id"] = new[old]
        field = {"images": "image_id", "categories": "category_id"}.get(section)
        for annotation in self._content["annotations"] if field else ():
            old = annotation.get(field) if isinstance(annotation, dict) else None
            if is_key(old) and not is_whole(old):
                annotation[field] = new.get(old, old)


def _has_id(entry: Any) -> bool:
    return isinstance(entry, dict) and is_key(entry.get("id"))


def _as_int(value: Any) -> int | None:
    """The whole number from 0 to 2**53 that a text or float represents."""
    try:
        number = int(value)
    except (ValueError, OverflowError, TypeError):
        return None
    return number if 0 <= number < 2**53 and float(value) == number else None


def _box_corners(box: Any) -> list[float] | None:
    """x0, y0, x1, y1 of a json's box, or None if it is invalid."""
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]] if are_numbers(box, 4) else None


def _image_size(image: dict[str, Any]) -> Size | None:
    height: Any = image.get("height")
    width: Any = image.get("width")
    return (height, width) if is_whole(height) and is_whole(width) else None


def _measure_mask(
    annotation: dict[str, Any], size: Size | None
) -> tuple[list[float] | None, float]:
    """x0, y0, x1, y1 of a mask, cut off at the edge of its image, and its area.

    Returns:
        None and 0 without a valid mask.
    """
    segmentation: Any = annotation.get("segmentation")
    kind = segmentation_kind(segmentation)
    if kind == "polygons":
        _, boxes, areas = measure_polygons([segmentation], [size])
    elif kind == "rle" and size is not None:
        _, boxes, areas = measure_rles([segmentation], [size])
    else:
        return None, 0.0
    if not np.isfinite(boxes).all():
        return None, 0.0
    x0, y0, x1, y1 = boxes[0].tolist()
    if size is not None:
        x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, size[1]), min(y1, size[0])
    return ([x0, y0, x1, y1] if x1 > x0 and y1 > y0 else None), float(areas[0])


# Each of the following repairs an entry in place, given its image, and returns whether the entry
# must be removed.


def _box_from_mask(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    box, _ = _measure_mask(annotation, _image_size(image))
    if box is not None:
        annotation["bbox"] = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return box is None


def _box_from_corners(annotation: dict[str, Any], _: dict[str, Any]) -> None:
    x0, y0, x1, y1 = annotation["bbox"]
    annotation["bbox"] = [x0, y0, x1 - x0, y1 - y0]


def _box_to_pixels(annotation: dict[str, Any], image: dict[str, Any]) -> None:
    sides = [image["width"], image["height"]] * 2
    annotation["bbox"] = [v * side for v, side in zip(annotation["bbox"], sides, strict=True)]


def _keep_valid_polygons(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    size = _image_size(image)
    annotation["segmentation"] = [
        polygon
        for polygon in annotation["segmentation"]
        if measure_polygons([[polygon]], [size])[2][0] > 0
    ]
    return not annotation["segmentation"]


def _compute_area(annotation: dict[str, Any], image: dict[str, Any]) -> None:
    box, area = _measure_mask(annotation, _image_size(image))
    if box is None and (box := _box_corners(annotation.get("bbox"))) is not None:
        area = max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
    annotation["area"] = area if 0 <= area < 1e12 else 0.0


def _correct_crowd(annotation: dict[str, Any], _: dict[str, Any]) -> None:
    annotation["iscrowd"] = lenient_flag(annotation["iscrowd"])


def _ignore_to_crowd(annotation: dict[str, Any], _: dict[str, Any]) -> None:
    if lenient_flag(annotation.pop("ignore")):
        annotation["iscrowd"] = 1


def _name_category(category: dict[str, Any], _: dict[str, Any]) -> None:
    name = category.get("name")
    is_plain = isinstance(name, int | float)  # also true and false
    category["name"] = json.dumps(name) if is_plain else f"category_{category.get('id')}"


def _remove_keypoints(annotation: dict[str, Any], _: dict[str, Any]) -> None:
    del annotation["keypoints"]
    annotation.pop("num_keypoints", None)


_REPAIRS: dict[str, Callable[[Any, dict[str, Any]], bool | None]] = {
    "category-name": _name_category,
    "mask-form": lambda entry, _: entry.update(segmentation=to_coco(entry["segmentation"])),
    "mask-flat": lambda entry, _: entry.update(segmentation=[entry["segmentation"]]),
    "box-xyxy": _box_from_corners,
    "box-normalised": _box_to_pixels,
    "crowd-flag": _correct_crowd,
    "crowd-type": _correct_crowd,
    "crowd-brush": lambda annotation, _: annotation.update(iscrowd=0),
    "crowd-missing": lambda annotation, _: annotation.update(iscrowd=0),
    "ignore": _ignore_to_crowd,
    "area": _compute_area,
    "area-missing": _compute_area,
    "keypoints": _remove_keypoints,
    **{kind: _keep_valid_polygons for kind in KINDS if kind.startswith("polygon-")},
    **{f"box-{k}": _box_from_mask for k in ("type", "nan", "negative", "outside", "empty", "mask")},
}
