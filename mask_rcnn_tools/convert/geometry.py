"""Turns the shapes of labelling tools into polygons, and objects into COCO annotations."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from mask_rcnn_plus.data.mask_rules import MAX_COORDINATE, is_number, mask_fault
from mask_rcnn_tools.check.masks import MIN_AREA
from mask_rcnn_tools.convert.labels import LabelledObject

_MAX_DEVIATION = 0.02  # pixels between an ellipse and its polygon, at most


class InvalidShape(Exception):
    """A shape that cannot be converted. The message is the end of a sentence."""


def to_number(value: Any) -> float:
    """A coordinate as a float.

    Raises:
        InvalidShape: it is not a number (a bool or a text is not one), or is extremely large.
    """
    if not is_number(value) or abs(value) > MAX_COORDINATE:
        raise InvalidShape(f"has the coordinate {value!r:.40}")
    return float(value)


def polygon(points: Any) -> list[float]:
    """The coordinates [x0, y0, x1, y1, ...] of corners [[x, y], ...].

    Raises:
        InvalidShape: there are fewer than three corners, or a coordinate is not a number.
    """
    if not isinstance(points, list) or any(
        not isinstance(point, (list, tuple)) or len(point) != 2 for point in points
    ):
        raise InvalidShape("has no list of corners [x, y]")
    if len(points) < 3:
        raise InvalidShape(f"has {len(points)} corner{'s' * (len(points) != 1)}")
    return [to_number(value) for point in points for value in point]


def rectangle(x0: Any, y0: Any, x1: Any, y1: Any) -> list[float]:
    """The polygon of a rectangle between two opposite corners, in any order."""
    x0, y0, x1, y1 = map(to_number, (x0, y0, x1, y1))
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def ellipse(cx: Any, cy: Any, rx: Any, ry: Any, theta: Any = 0.0) -> list[float]:
    """The polygon of an ellipse, accurate to 0.02 pixels.

    Args:
        cx, cy: the centre.
        rx, ry: the half axes.
        theta: rotation of the first axis, in radians, clockwise on the screen.

    Raises:
        InvalidShape: a value is not a number, or a half axis is not above 0.
    """
    cx, cy, rx, ry, theta = map(to_number, (cx, cy, rx, ry, theta))
    if min(rx, ry) <= 0:
        raise InvalidShape(f"has the radius {min(rx, ry):g}")
    corners = math.ceil(math.pi / math.acos(1 - min(_MAX_DEVIATION / max(rx, ry), 0.5)))
    angles = np.arange(max(corners, 8)) * (2 * math.pi / max(corners, 8))
    along, across = rx * np.cos(angles), ry * np.sin(angles)
    x = cx + along * math.cos(theta) - across * math.sin(theta)
    y = cy + along * math.sin(theta) + across * math.cos(theta)
    return np.stack([x, y], axis=1).ravel().tolist()


def turned(corners: list[float], degrees: Any, x: float, y: float) -> list[float]:
    """A polygon, turned clockwise on the screen around the point (x, y)."""
    angle = math.radians(to_number(degrees))
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        value
        for dx, dy in (
            (px - x, py - y) for px, py in zip(corners[0::2], corners[1::2], strict=True)
        )
        for value in (x + dx * cos - dy * sin, y + dx * sin + dy * cos)
    ]


def clip(corners: list[float], width: int, height: int) -> list[float]:
    """The part of a polygon inside the image; the same polygon if it is completely inside.

    The algorithm of Sutherland and Hodgman (1974). If the clipping splits the polygon, the result
    is still one polygon: edges along the border, which enclose no area, connect its parts.

    Returns:
        [] if no part is inside.
    """
    points = list(zip(corners[0::2], corners[1::2], strict=True))
    for axis, limit, sign in (
        (0, 0.0, 1),
        (0, float(width), -1),
        (1, 0.0, 1),
        (1, float(height), -1),
    ):
        if all(sign * (point[axis] - limit) >= 0 for point in points):
            continue
        kept: list[tuple[float, float]] = []
        for start, end in zip(points, points[1:] + points[:1], strict=True):
            before, after = (sign * (point[axis] - limit) for point in (start, end))
            if before >= 0:
                kept.append(start)
            if before * after < 0:
                part = before / (before - after)
                crossing = [s + part * (e - s) for s, e in zip(start, end, strict=True)]
                crossing[axis] = limit
                kept.append((crossing[0], crossing[1]))
        points = kept
    return [value for point in points for value in point] if len(points) > 2 else []


def _area(corners: list[float]) -> float:
    """The area of a polygon. Loops in opposite directions cancel each other."""
    x, y = np.array(corners[0::2]), np.array(corners[1::2])
    x, y = x - x[0], y - y[0]
    return float(abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2


def to_rle(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's run lengths of a mask (H, W), for JSON."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def to_annotation(labelled: LabelledObject, height: int, width: int) -> dict[str, Any]:
    """COCO's segmentation, bbox, area and iscrowd of an object.

    Polygons stay polygons, clipped to the image, with the box of their corners. An object with an
    RLE becomes one RLE, and so does a polygon whose loops cancel each other. The area is the number
    of pixels that pycocotools assigns to the object.

    Raises:
        InvalidShape: the object covers no pixel of the image.
    """
    polygons = [part for p in labelled.polygons if (part := clip(p, width, height))]
    if fault := mask_fault(polygons, [height, width]):
        raise InvalidShape(fault)
    solid = [p for p in polygons if _area(p) > MIN_AREA]
    parts = [*coco_mask.frPyObjects(polygons, height, width)] if polygons else []
    if labelled.rle is not None:
        parts.append({**labelled.rle, "counts": labelled.rle["counts"].encode()})
    merged = coco_mask.merge(parts) if parts else None
    area = int(coco_mask.area(merged)) if merged else 0
    if merged is None or area == 0:
        raise InvalidShape("covers no pixel of its image")
    # Remove polygons without area, unless they cover pixels, like a polygon in the form of an 8.
    if len(solid) < len(polygons) and solid:
        without_flat = coco_mask.merge(coco_mask.frPyObjects(solid, height, width))
        polygons = solid if coco_mask.area(without_flat) == area else polygons
    segmentation: Any
    if labelled.rle is None and all(_area(p) > MIN_AREA for p in polygons):
        segmentation = polygons
        xs, ys = ([v for p in polygons for v in p[axis::2]] for axis in (0, 1))
        box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    else:
        segmentation = {"size": [height, width], "counts": merged["counts"].decode()}
        box = coco_mask.toBbox(merged).tolist()
    return {"bbox": box, "area": area, "iscrowd": 0, "segmentation": segmentation}
