"""Converts segmentations of other tools to COCO: points as pairs, objects or text."""

import contextlib
import json
import re
from typing import Any

from mask_rcnn_plus.data.mask_rules import are_numbers

_X_Y = (("x", "y"), ("all_points_x", "all_points_y"))


def to_coco(segmentation: Any) -> Any:
    """Converts a segmentation in another form to polygons [[x0, y0, x1, y1, ...], ...] or an RLE.

    A polygon may be a list of points [x, y], [[x, y]] or {"x": x, "y": y}; an object
    {"x": [...], "y": [...]}; or text such as "x,y x,y x,y". All may also be json in a string.

    Returns:
        None if the segmentation already has COCO's form, or an unknown form.
    """
    value = segmentation
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):  # not json; it may be numbers
            value = json.loads(value)
        if isinstance(value, dict) and "counts" in value:
            return value
    if polygon := to_polygon(value):
        return [polygon]
    polygons = [to_polygon(part) for part in value] if isinstance(value, list) else []
    return polygons if polygons and all(polygons) and polygons != segmentation else None


def to_polygon(value: Any) -> list[float] | None:
    """A polygon of at least three points as [x0, y0, x1, y1, ...]; None if it is not one."""
    points: list[Any] = value
    if isinstance(value, str) and re.fullmatch(r"[-+\d.eE,;\s()\[\]]+", value):
        try:
            points = [float(number) for number in re.findall(r"[-+\d.eE]+", value)]
        except ValueError:
            return None
    elif isinstance(value, dict):
        lists = next(([value[x], value[y]] for x, y in _X_Y if x in value and y in value), [])
        if not lists or not all(isinstance(numbers, list) for numbers in lists):
            return None
        if len(lists[0]) != len(lists[1]):
            return None
        points = [list(point) for point in zip(*lists, strict=True)]
    if not isinstance(points, list) or not points:
        return None
    if not are_numbers(points):
        pairs = [_point(point) for point in points]
        if not all(pairs):
            return None
        points = [number for pair in pairs for number in pair or ()]
    return points if len(points) >= 6 and len(points) % 2 == 0 else None


def _point(value: Any) -> list[float] | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]  # OpenCV's contours
    if isinstance(value, dict):
        value = [value.get("x"), value.get("y")]
    return value if are_numbers(value, 2) else None
