"""Checks which masks of a json are safe for pycocotools.

pycocotools checks nothing. Run lengths that do not fit the image make it read and write beyond its
memory. NaN or a huge coordinate in a polygon makes it allocate memory without limit.
"""

import itertools
import math
import reprlib
from typing import Any

from PIL import Image

# The longest outline in pixels. pycocotools stores five steps per pixel: at most 0.8 GB.
MAX_STEPS = 20_000_000
# In pixels. Limits the steps of a short edge, and stays within an integer's range.
MAX_COORDINATE = 1_000_000.0


def max_pixels() -> int:
    """The pixels of the largest image that Pillow opens; see ``Image.MAX_IMAGE_PIXELS``."""
    return min(2 * (Image.MAX_IMAGE_PIXELS or 2**30), 2**31 - 1)


def is_number(value: Any, limit: float = 1e15) -> bool:
    """Whether a json's value is a number between -limit and limit. NaN, true and false are not.

    Numbers above the default limit are not sizes, scores or losses, and some libraries fail on
    them.
    """
    return type(value) in (int, float) and -limit < value < limit


def are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether a json's value is a list of numbers, NaN among them, with ``count`` of them."""
    if not isinstance(values, list) or count not in (None, len(values)):
        return False
    return set(map(type, values)) <= {int, float}


def mask_fault(segmentation: Any, size: list[int]) -> str:
    """The reason, as a clause, why a mask is unsafe for pycocotools; "" if it is safe or missing.

    Args:
        segmentation: an annotation's polygons or RLE, or any other value of a json.
        size: [height, width] of the image.
    """
    if not segmentation:
        return ""
    if isinstance(segmentation, dict):
        return rle_fault(segmentation, size)
    if not isinstance(segmentation, list):
        shown = reprlib.repr(segmentation)
        return f"has the segmentation {shown}, which is neither polygons nor an RLE"
    for polygon in segmentation:
        if not are_numbers(polygon):
            return f"has the polygon {reprlib.repr(polygon)}, which is not a list of numbers"
        if fault := _coordinates_fault(polygon):
            return fault
    return ""


def _coordinates_fault(polygon: list[float]) -> str:
    """The reason why a polygon's numbers are unsafe, as in ``mask_fault``."""
    if not polygon:
        return ""
    low, high = min(polygon), max(polygon)
    try:
        # min and max may miss a NaN, the sum does not.
        finite = all(map(math.isfinite, (low, high, sum(polygon))))
    except OverflowError:  # an integer with hundreds of digits
        finite = False
    if not finite:
        return "has a polygon with a coordinate that is not finite"
    if max(-low, high) > MAX_COORDINATE:
        return f"has a polygon with the coordinate {high if high > -low else low:g}"
    if len(polygon) * (high - low) > MAX_STEPS:  # an upper bound
        points = list(zip(polygon[0::2], polygon[1::2], strict=False))
        edges = itertools.pairwise([*points, points[0]])
        steps = sum(max(abs(x1 - x0), abs(y1 - y0)) for (x0, y0), (x1, y1) in edges)
        if steps > MAX_STEPS:
            return f"has a polygon whose outline is {steps:.0f} pixels long"
    return ""


def rle_fault(rle: dict[str, Any], size: list[int]) -> str:
    """The reason why an RLE does not fit an image of [height, width], as in ``mask_fault``."""
    if rle.get("size") != size or {type(side) for side in rle["size"]} != {int}:
        return f"has an RLE of the size {reprlib.repr(rle.get('size'))}, and its image {size}"
    counts = run_lengths(rle)
    if counts is None:
        return "has an RLE whose 'counts' are not run lengths"
    if sum(counts) != size[0] * size[1]:
        return f"has an RLE of {sum(counts)} pixels, and its image {size[0] * size[1]}"
    return ""


def run_lengths(rle: dict[str, Any]) -> list[int] | None:
    """The run lengths of an RLE, each 0 or more, or None if its counts are invalid."""
    counts = rle.get("counts")
    if isinstance(counts, str):
        counts = _decompress(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        return None
    return counts


def _decompress(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed form, or None if the text is not in that form.

    Each character, less 48, holds five bits of a number, the lowest first. Bit 6 means that more
    follow; bit 5 of the last character is the sign. From the fourth run on, the number is the
    difference from the run two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts if shift == 0 else None
