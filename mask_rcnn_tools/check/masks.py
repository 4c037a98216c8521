"""Checks and measures the masks of many annotations at once: polygons and run lengths (RLE)."""

import reprlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mask_rcnn_plus.data.mask_rules import (
    MAX_COORDINATE,
    MAX_STEPS,
    are_numbers,
    rle_fault,
    run_lengths,
)
from mask_rcnn_tools.check.forms import to_coco
from mask_rcnn_tools.check.problems import Annotations

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Size = tuple[int, int]  # height, width

MIN_AREA = 1e-6  # square pixels; a smaller polygon counts as flat
_CHUNK = 50_000  # annotations measured at once
_TOLERANCE = 1.0  # pixels that a mask or box may extend beyond the edge of its image
_FAR = 10  # a polygon may reach this many image sides outside its image


def check_masks(annotations: Annotations) -> Iterator[Floats]:
    """Checks the masks, chunk by chunk.

    Yields:
        for each chunk of C annotations (C, 4): x0, y0, x1, y1 around their masks in pixels; NaN
        without a usable mask.
    """
    any_mask = any(annotation.get("segmentation") for annotation in annotations.entries)
    if annotations.entries and not any_mask:
        annotations.add_problem("no-masks", 0)
    first_rle = True
    for start in range(0, len(annotations.entries), _CHUNK):
        part = slice(start, start + _CHUNK)
        chunk = Annotations(
            annotations.problems,
            annotations.positions[part],
            annotations.entries[part],
            annotations.sizes[part],
        )
        boxes, rles = _check_chunk(chunk, any_mask)
        if rles and first_rle:
            first_rle = False
            chunk.add_problem("rle", rles[0])
        _check_place(chunk, boxes)
        yield boxes


def segmentation_kind(segmentation: Any) -> str:
    """The kind of a segmentation: "polygons", "rle", "none", or the kind of problem it has."""
    if segmentation is None or segmentation in ([], {}):
        return "none"
    if isinstance(segmentation, list):
        if are_numbers(segmentation):
            return "mask-flat"
        if all(
            isinstance(part, list) and len(part) > 5 and are_numbers(part[:1])
            for part in segmentation
        ):
            return "polygons"
    elif isinstance(segmentation, dict) and "counts" in segmentation:
        return "rle"
    if to_coco(segmentation) is not None:
        return "mask-form"
    if isinstance(segmentation, list):
        return "polygons"
    return "rle" if isinstance(segmentation, dict) else "mask-type"


def _check_chunk(chunk: Annotations, any_mask: bool) -> tuple[Floats, list[int]]:
    """The boxes of the masks, and the indices of the RLE masks."""
    boxes, areas = _no_measurements(len(chunk.entries))
    by_kind: dict[str, list[int]] = {"polygons": [], "rle": []}
    has_mask = np.zeros(len(chunk.entries), bool)
    for index, annotation in enumerate(chunk.entries):
        segmentation = annotation.get("segmentation")
        kind = segmentation_kind(segmentation)
        if kind in by_kind:
            by_kind[kind].append(index)
        elif kind != "none":
            chunk.add_problem(kind, index, f"has the segmentation {reprlib.repr(segmentation)}")
        elif any_mask:
            chunk.add_problem("mask-missing", index, "has no segmentation")

    polygons = by_kind["polygons"]
    has_mask[polygons] = True
    faults, boxes[polygons], areas[polygons] = measure_polygons(
        [chunk.entries[index]["segmentation"] for index in polygons],
        [chunk.sizes[index] for index in polygons],
    )
    for number, kind, detail in faults:
        has_mask[polygons[number]] &= kind == "polygon-flat"
        chunk.add_problem(kind, polygons[number], detail)

    # Without a valid size, the problem is the image's, not the mask's.
    rles = [index for index in by_kind["rle"] if chunk.sizes[index] is not None]
    segmentations = [chunk.entries[index]["segmentation"] for index in rles]
    sizes = [chunk.sizes[index] or (0, 0) for index in rles]
    rle_faults, boxes[rles], areas[rles] = measure_rles(segmentations, sizes)
    for index, rle, size, fault in zip(rles, segmentations, sizes, rle_faults, strict=True):
        has_mask[index] = not fault
        if fault:
            chunk.add_problem("rle-counts" if _has_size(rle, size) else "rle-size", index, fault)

    for index in np.flatnonzero(has_mask & (areas == 0)).tolist():
        chunk.add_problem("mask-empty", index, "has a mask without pixels")
    return boxes, by_kind["rle"]


def _check_place(chunk: Annotations, boxes: Floats) -> None:
    """Compares masks with their images; sets the boxes of masks outside their image to NaN."""
    outside, over_edge = place_in_image(boxes, chunk.sizes)
    for kind, which, text in (
        ("mask-outside", outside, "is outside"),
        ("mask-over-edge", over_edge, "extends beyond the edge of"),
    ):
        for index in np.flatnonzero(which).tolist():
            x0, y0, x1, y1 = boxes[index]
            height, width = chunk.sizes[index] or (0, 0)
            detail = (
                f"has a mask from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), which {text} its image of "
                f"{width} x {height}"
            )
            chunk.add_problem(kind, index, detail)
    boxes[outside] = np.nan


def place_in_image(boxes: Floats, sizes: Sequence[Size | None]) -> tuple[Flags, Flags]:
    """Compares boxes with their images.

    Args:
        boxes: (B, 4): x0, y0, x1, y1 in pixels, or NaN.
        sizes: B (height, width), or None.

    Returns:
        (B,) whether a box is completely outside its image, and (B,) whether one of the others
        extends beyond the edge. Both are false for NaN and None.
    """
    limits = np.array([size or (np.inf, np.inf) for size in sizes], np.float64).reshape(-1, 2)
    height, width = limits[:, 0], limits[:, 1]
    x0, y0, x1, y1 = boxes.T
    known = np.isfinite(height)
    outside = known & ((x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height))
    over_edge = (np.minimum(x0, y0) < -_TOLERANCE) | (x1 > width + _TOLERANCE)
    over_edge |= y1 > height + _TOLERANCE
    return outside, known & over_edge & ~outside


def _no_measurements(count: int) -> tuple[Floats, Floats]:
    return np.full((count, 4), np.nan), np.zeros(count)


def measure_polygons(
    masks: Sequence[list[Any]], sizes: Sequence[Size | None]
) -> tuple[list[tuple[int, str, str]], Floats, Floats]:
    """Checks and measures masks of polygons.

    Args:
        masks: M lists of polygons, which may hold anything.
        sizes: (height, width) of each mask's image, or None.

    Returns:
        (index of the mask, kind of problem, detail) of each invalid polygon; boxes (M, 4): x0, y0,
        x1, y1 around the valid polygons, in pixels; and the sums of the valid polygons' areas (M,).
        A mask without a valid polygon has a box of NaN and the area 0.
    """
    faults: list[tuple[int, str, str]] = []
    coordinates: list[float] = []
    corners: list[int] = []
    owners: list[int] = []
    for number, polygons in enumerate(masks):
        for polygon in polygons:
            if kind := _structure_problem(polygon):
                faults.append((number, kind, f"has the polygon {reprlib.repr(polygon)}"))
                continue
            coordinates += polygon
            corners.append(len(polygon) // 2)
            owners.append(number)
    boxes, areas = _no_measurements(len(masks))
    if not corners:
        return faults, boxes, areas
    try:
        points = np.array(coordinates, np.float64).reshape(-1, 2)
    except OverflowError:  # whole numbers with hundreds of digits
        points = np.array([_to_float(value) for value in coordinates]).reshape(-1, 2)
    owner = np.array(owners)
    low, high, area, length, finite = _measure_outlines(points, np.array(corners))

    sides = np.array([max(sizes[number] or (10**5, 10**5)) for number in owners], np.float64)
    limit = np.minimum(_FAR * sides + 1000, MAX_COORDINATE)
    absurd = finite & ((low.min(1) < -limit) | (high.max(1) > limit) | (length > MAX_STEPS))
    flat = finite & ~absurd & (area < MIN_AREA)
    for index in np.flatnonzero(~finite | absurd | flat):
        (x0, y0), (x1, y1) = low[index].tolist(), high[index].tolist()
        if not finite[index]:
            kind, detail = "polygon-nan", "with a coordinate that is NaN or infinite"
        elif flat[index]:
            kind, detail = "polygon-flat", f"of {corners[index]} corners without area"
        else:
            detail = f"from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), whose outline is "
            kind, detail = "polygon-absurd", f"{detail}{length[index]:.0f} pixels long"
        faults.append((owners[index], kind, f"has a polygon {detail}"))

    valid = np.flatnonzero(finite & ~absurd & ~flat)
    if len(valid):
        firsts = np.flatnonzero(np.diff(owner[valid], prepend=-1))
        measured = owner[valid][firsts]
        boxes[measured, :2] = np.minimum.reduceat(low[valid], firsts)
        boxes[measured, 2:] = np.maximum.reduceat(high[valid], firsts)
        areas[measured] = np.add.reduceat(area[valid], firsts)
    return faults, boxes, areas


def _structure_problem(polygon: Any) -> str:
    """The kind of problem that a polygon has apart from its coordinates' values, or ""."""
    if not are_numbers(polygon):
        return "polygon-type"
    if len(polygon) < 6:
        return "polygon-short"
    return "polygon-odd" if len(polygon) % 2 else ""


def _measure_outlines(
    points: Floats, corners: Ints
) -> tuple[Floats, Floats, Floats, Floats, Flags]:
    """Per polygon: lowest and highest (x, y), area, length, whether all coordinates are finite."""
    ends = np.cumsum(corners)
    starts = ends - corners
    finite = np.logical_and.reduceat(np.isfinite(points).all(1), starts)
    # The bounds prevent an overflow and are far beyond what counts as absurd.
    points = np.clip(np.nan_to_num(points), -1e12, 1e12)
    following = np.arange(1, len(points) + 1)
    following[ends - 1] = starts
    # Relative to the polygon's first point: differences of large products would lose a small area.
    local = points - np.repeat(points[starts], corners, axis=0)
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


def measure_rles(
    rles: Sequence[dict[str, Any]], sizes: Sequence[Size]
) -> tuple[list[str], Floats, Floats]:
    """Checks and measures masks of run lengths.

    Args:
        rles: R masks, as in the json.
        sizes: (height, width) of each mask's image.

    Returns:
        the fault of each mask, as ``rle_fault`` returns it, or ""; boxes (R, 4): x0, y0, x1, y1 in
        pixels; and areas (R,) in pixels. A mask with a fault or without pixels has a box of NaN
        and the area 0.
    """
    faults = [""] * len(rles)
    boxes, areas = _no_measurements(len(rles))
    # Compressed run lengths are decoded all at once; the rest is checked one by one.
    fast = [
        number
        for number, (rle, size) in enumerate(zip(rles, sizes, strict=True))
        if _has_size(rle, size)
        and type(text := rle.get("counts")) is str
        and text.isascii()
        and text
    ]
    counts, spans = _decompress([rles[number]["counts"] for number in fast])
    fast = fast[: len(spans)]
    if fast:
        starts = np.cumsum(spans) - spans
        pixels = np.array([sizes[number][0] * sizes[number][1] for number in fast])
        valid = np.add.reduceat(counts, starts) == pixels
        valid &= np.minimum.reduceat(counts, starts) >= 0
        counts, spans = counts[np.repeat(valid, spans)], spans[valid]
        fast = [number for number, is_valid in zip(fast, valid, strict=True) if is_valid]

    measured = list(fast)
    lists: list[Ints] = []
    for number in sorted(set(range(len(rles))) - set(fast)):
        faults[number] = rle_fault(rles[number], list(sizes[number]))
        if not faults[number]:
            lists.append(np.array(run_lengths(rles[number]) or [0], np.int64))
            measured.append(number)
    if measured:
        counts = np.concatenate([counts, *lists])
        spans = np.concatenate([spans, np.array([len(part) for part in lists], np.int64)])
        heights = np.array([sizes[number][0] for number in measured])
        boxes[measured], areas[measured] = _measure_runs(counts, spans, heights)
    return faults, boxes, areas


def _has_size(rle: dict[str, Any], size: Size) -> bool:
    """Whether an RLE has the size of its image, as whole numbers."""
    own = rle.get("size")
    return own == list(size) and type(own[0]) is int and type(own[1]) is int


def _decompress(texts: list[str]) -> tuple[Ints, Ints]:
    """Decodes COCO's compressed run lengths (the format is described in ``mask_rules``).

    Args:
        texts: M masks' counts, each of at least one ASCII character.

    Returns:
        all run lengths in a row, and how many each mask has (M,); both are empty if any text is
        malformed.
    """
    nothing = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if not texts:
        return nothing
    codes = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.cumsum([len(text) for text in texts])
    is_last = (codes & 32) == 0
    if codes.min() < 0 or codes.max() > 63 or not is_last[ends - 1].all():
        return nothing
    tails = np.flatnonzero(is_last)  # the last character of each number
    heads = np.append(0, tails[:-1] + 1)
    if (tails - heads).max() > 6:  # more than 35 bits, so that sums might overflow
        return nothing
    place = np.arange(len(codes)) - np.repeat(heads, tails - heads + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), heads)
    negative = (codes[tails] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (tails - heads + 1)), 0)
    # From the fourth on, a number is the difference to the last but one. Undo that by cumulative
    # sums: over a mask's odd places from 1 on, and over its even places from 2 on.
    spans = np.diff(np.append(0, np.searchsorted(tails, ends - 1) + 1))
    rank = np.arange(len(values)) - np.repeat(np.cumsum(spans) - spans, spans)
    for parity in (0, 1):
        chosen = np.flatnonzero((rank % 2 == parity) & (rank > 0))
        if len(chosen):
            total = np.cumsum(values[chosen])
            first = np.flatnonzero(rank[chosen] == 2 - parity)
            before = total[first] - values[chosen][first]
            values[chosen] = total - np.repeat(before, np.diff(np.append(first, len(chosen))))
    return values, spans


def _measure_runs(counts: Ints, spans: Ints, heights: Ints) -> tuple[Floats, Floats]:
    """Boxes and areas of masks whose runs fill their image, column by column.

    Args:
        counts: all run lengths in a row; the first of each mask is background.
        spans: (M,): how many runs each mask has.
        heights: (M,): of the images, in pixels.
    """
    starts = np.cumsum(spans) - spans
    rank = np.arange(len(counts)) - np.repeat(starts, spans)
    total = np.cumsum(counts)
    stops = total - np.repeat(total[starts] - counts[starts], spans)
    begins = stops - counts
    on = (rank % 2 == 1) & (counts > 0)
    height = np.repeat(heights, spans)
    (x0, y0), (x1, y1) = np.divmod(begins, height), np.divmod(stops - 1, height)
    one_column = x0 == x1
    y0, y1 = np.where(one_column, y0, 0), np.where(one_column, y1 + 1, height)
    low = np.where(on, (x0, y0), np.int64(2**62))
    high = np.where(on, (x1 + 1, y1), -np.int64(2**62))
    low, high = np.minimum.reduceat(low, starts, axis=1), np.maximum.reduceat(high, starts, axis=1)
    boxes = np.concatenate([low, high]).T.astype(np.float64)
    areas = np.add.reduceat(np.where(on, counts, 0), starts).astype(np.float64)
    boxes[areas == 0] = np.nan
    return boxes, areas
