"""Masks of all annotations: what is wrong with them, their boxes and areas."""

import reprlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mask_rcnn_tools.check.polygons import measure_polygons
from mask_rcnn_tools.check.problems import Findings
from mask_rcnn_tools.check.run_lengths import measure_rles
from mask_rcnn_tools.check.structure import Objects

Floats = npt.NDArray[np.float64]

_show = reprlib.repr
CHUNK = 50_000  # annotations measured at once
_EDGE = 1.0  # pixels that a mask or box may reach over the edge


def check_masks(findings: Findings, objects: Objects) -> Iterator[tuple[int, Floats, Floats]]:
    """Checks the masks, chunk by chunk.

    Args:
        findings: gets the problems.
        objects: the annotations to check.

    Yields:
        how many annotations C the chunk has; their masks' boxes (C, 4): x0, y0, x1, y1 in pixels,
        NaN without a good mask; and the masks' areas (C,), 0 without one.
    """
    some = any(annotation.get("segmentation") for annotation in objects.annotations)
    if not some and objects.annotations:
        findings.add("no-masks", "annotations", objects.indices[0])
    has_rle = False
    for start in range(0, len(objects.indices), CHUNK):
        part = slice(start, start + CHUNK)
        chunk = Objects(objects.indices[part], objects.annotations[part], objects.sizes[part])
        boxes, areas, rle = _check_chunk(findings, chunk, some)
        if rle and not has_rle:
            has_rle = True
            findings.add("rle", "annotations", rle[0])
        _check_place(findings, chunk, boxes)
        yield len(chunk.indices), boxes, areas


def segmentation_kind(segmentation: Any) -> str:
    """What a segmentation is: "polygons", "rle", "none", or the kind of problem."""
    if isinstance(segmentation, dict) and segmentation:
        return "rle"
    if segmentation is None or segmentation in ([], {}):
        return "none"
    if not isinstance(segmentation, list):
        return "mask-type"
    if set(map(type, segmentation)) <= {int, float}:
        return "mask-flat"
    return "polygons"


def _check_chunk(
    findings: Findings, chunk: Objects, some: bool
) -> tuple[Floats, Floats, list[int]]:
    count = len(chunk.indices)
    boxes, areas = np.full((count, 4), np.nan), np.zeros(count)
    places: dict[str, list[int]] = {"polygons": [], "rle": []}
    bad: set[int] = set()
    for place, annotation in enumerate(chunk.annotations):
        segmentation = annotation.get("segmentation")
        kind = segmentation_kind(segmentation)
        if kind in places:
            places[kind].append(place)
        elif kind != "none":
            bad.add(place)
            detail = f"has the segmentation {_show(segmentation)}"
            findings.add(kind, "annotations", chunk.indices[place], detail)
        elif some:
            detail = "has no segmentation"
            findings.add("mask-missing", "annotations", chunk.indices[place], detail)

    drawn = places["polygons"]

    def report(number: int, kind: str, detail: str) -> None:
        if kind != "polygon-flat":
            bad.add(drawn[number])
        findings.add(kind, "annotations", chunk.indices[drawn[number]], detail)

    boxes[drawn], areas[drawn] = measure_polygons(
        [chunk.annotations[place]["segmentation"] for place in drawn],
        [chunk.sizes[place] for place in drawn],
        report,
    )

    # Where the image has no size, the image is at fault.
    packed = [place for place in places["rle"] if chunk.sizes[place] is not None]
    faults, boxes[packed], areas[packed] = measure_rles(
        [chunk.annotations[place]["segmentation"] for place in packed],
        [chunk.sizes[place] or (0, 0) for place in packed],
    )
    for place, fault in zip(packed, faults, strict=True):
        if fault:
            bad.add(place)
            kind = "rle-size" if "of the size" in fault else "rle-counts"
            findings.add(kind, "annotations", chunk.indices[place], fault)
    has_mask = np.zeros(count, bool)
    has_mask[drawn + packed] = True
    has_mask[list(bad)] = False
    for place in np.flatnonzero(has_mask & (areas == 0)).tolist():
        findings.add("mask-empty", "annotations", chunk.indices[place], "has a mask of no pixel")
    for place in (place for place in drawn if chunk.annotations[place].get("iscrowd") == 1):
        findings.add("crowd-polygons", "annotations", chunk.indices[place])
    return boxes, areas, [chunk.indices[place] for place in places["rle"]]


def _check_place(findings: Findings, chunk: Objects, boxes: Floats) -> None:
    outside, over = place_in_image(boxes, chunk.sizes)
    for kind, places, verb in (
        ("mask-outside", outside, "lies outside"),
        ("mask-over-edge", over, "reaches over the edge of"),
    ):
        for place in np.flatnonzero(places):
            x0, y0, x1, y1 = boxes[place]
            height, width = chunk.sizes[place] or (0, 0)
            detail = (
                f"has a mask from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), which {verb} its image of "
                f"{width} x {height}"
            )
            findings.add(kind, "annotations", chunk.indices[place], detail)
    boxes[outside] = np.nan  # nothing to measure others by


def place_in_image(
    boxes: Floats, sizes: list[tuple[int, int] | None]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which boxes lie wholly outside their image, and which others reach over its edge.

    Args:
        boxes: (B, 4): x0, y0, x1, y1 in pixels; NaN is neither.
        sizes: B (height, width); None is neither.

    Returns:
        two masks of (B,).
    """
    limits = np.array([size or (np.inf, np.inf) for size in sizes], np.float64).reshape(-1, 2)
    height, width = limits[:, 0], limits[:, 1]
    x0, y0, x1, y1 = boxes.T
    known = np.isfinite(height)
    outside = known & ((x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height))
    over = (x0 < -_EDGE) | (y0 < -_EDGE) | (x1 > width + _EDGE) | (y1 > height + _EDGE)
    return outside, known & over & ~outside
