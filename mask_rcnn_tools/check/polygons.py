"""Polygons of many masks at once: whether they are any, their boxes, areas and lengths."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mask_rcnn_plus.data.mask_rules import MAX_COORDINATE, MAX_STEPS

Floats = npt.NDArray[np.float64]

_show = reprlib.repr
# How many image sides off a polygon may reach before it cannot be meant.
_FAR = 10
MIN_AREA = 1e-6  # square pixels


class Measured(NamedTuple):
    """Of M masks. A mask without a good polygon has a box of NaN and the area 0.

    Attributes:
        boxes: (M, 4): x0, y0, x1, y1 around the good polygons, in pixels.
        areas: (M,): the sum of the good polygons' areas.
    """

    boxes: Floats
    areas: Floats


def shape_fault(polygon: Any) -> tuple[str, str]:
    """The kind of what is wrong with a polygon before its numbers are looked at, and the detail."""
    if not isinstance(polygon, list) or not set(map(type, polygon)) <= {int, float}:
        return "polygon-type", f"has the polygon {_show(polygon)}"
    if len(polygon) < 6:
        return "polygon-short", f"has the polygon {_show(polygon)}"
    if len(polygon) % 2:
        return "polygon-odd", f"has a polygon of {len(polygon)} numbers"
    return "", ""


def measure_polygons(
    masks: list[list[Any]],
    sizes: list[tuple[int, int] | None],
    report: Callable[[int, str, str], None],
) -> Measured:
    """Checks and measures masks.

    Args:
        masks: M lists of what should be polygons.
        sizes: (height, width) of each one's image, or None.
        report: takes a mask's number, a kind of problem and its detail.
    """
    coordinates: list[float] = []
    lengths: list[int] = []
    owners: list[int] = []
    for number, polygons in enumerate(masks):
        for polygon in polygons:
            kind, detail = shape_fault(polygon)
            if kind:
                report(number, kind, detail)
                continue
            coordinates += polygon
            lengths.append(len(polygon) // 2)
            owners.append(number)
    boxes = np.full((len(masks), 4), np.nan)
    areas = np.zeros(len(masks))
    if not lengths:
        return Measured(boxes, areas)
    try:
        points = np.array(coordinates, np.float64).reshape(-1, 2)
    except OverflowError:  # whole numbers of hundreds of digits
        points = np.array([_to_float(value) for value in coordinates]).reshape(-1, 2)
    owner = np.array(owners)
    low, high, area, steps, finite = _measure(points, np.array(lengths))

    sides = np.array([max(sizes[number] or (10**5, 10**5)) for number in owners], np.float64)
    limit = np.minimum(_FAR * sides + 1000, MAX_COORDINATE)
    absurd = finite & ((low.min(1) < -limit) | (high.max(1) > limit) | (steps > MAX_STEPS))
    flat = finite & ~absurd & (area < MIN_AREA)
    for place in np.flatnonzero(~finite):
        report(owners[place], "polygon-nan", "has a polygon with a coordinate that is not finite")
    for place in np.flatnonzero(absurd):
        (x0, y0), (x1, y1) = low[place].tolist(), high[place].tolist()
        report(
            owners[place],
            "polygon-absurd",
            f"has a polygon from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), {steps[place]:.0f} long",
        )
    for place in np.flatnonzero(flat):
        report(owners[place], "polygon-flat", f"has a flat polygon of {lengths[place]} corners")

    good = np.flatnonzero(finite & ~absurd & ~flat)
    if len(good):
        firsts = np.flatnonzero(np.diff(owner[good], prepend=-1))
        mine = owner[good][firsts]
        boxes[mine, :2] = np.minimum.reduceat(low[good], firsts)
        boxes[mine, 2:] = np.maximum.reduceat(high[good], firsts)
        areas[mine] = np.add.reduceat(area[good], firsts)
    return Measured(boxes, areas)


def good_polygons(polygons: list[Any], size: tuple[int, int] | None) -> list[list[float]]:
    """Those of a mask's polygons that ``measure_polygons`` finds nothing wrong with."""
    return [
        polygon
        for polygon in polygons
        if measure_polygons([[polygon]], [size], lambda *_: None).areas[0] > 0
    ]


def _measure(
    points: Floats, lengths: npt.NDArray[np.int64]
) -> tuple[Floats, Floats, Floats, Floats, npt.NDArray[np.bool_]]:
    """Of each polygon: its least and greatest (x, y), area, length, whether all is finite."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    finite = np.logical_and.reduceat(np.isfinite(points).all(1), starts)
    # Bounded, so that what is huge gives no overflow; it is told by its bounds.
    points = np.clip(np.nan_to_num(points), -1e12, 1e12)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    # From each polygon's first point, lest the difference of large products hide a small area.
    local = points - np.repeat(points[starts], lengths, axis=0)
    other = local[following]
    cross = local[:, 0] * other[:, 1] - local[:, 1] * other[:, 0]
    return (
        np.minimum.reduceat(points, starts),
        np.maximum.reduceat(points, starts),
        np.abs(np.add.reduceat(cross, starts)) / 2,
        np.add.reduceat(np.abs(other - local).max(1), starts),
        finite,
    )


def _to_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf")
