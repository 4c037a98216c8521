"""COCO's run lengths taken apart and put together, without an image in between.

pycocotools decodes a mask into all pixels of its image; an object of a large one fills few of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mask_rcnn_plus.ops.fallback_rle import Positions, to_counts

Bitmap = npt.NDArray[np.uint8]
# (x0, y0, x1, y1) in whole pixels of the image, the last two not included.
Window = tuple[int, int, int, int]


def runs(rle: Mapping[str, Any]) -> tuple[Positions, Positions]:
    """Where the ones of a mask begin and end, in the image read column by column.

    Args:
        rle: ``{"size": [H, W], "counts": bytes or str}``, compressed and well formed.

    Returns:
        (K,) and (K,): begin <= position < end, in order and not empty.
    """
    counts = rle["counts"]
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8) - 48
    codes = codes.astype(np.int64)
    if codes.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    # Five bits a character, least first; the sixth says that more follow.
    last = (codes & 32) == 0
    firsts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(codes)) - np.repeat(firsts, np.diff(np.append(firsts, len(codes))))
    lengths = np.add.reduceat((codes & 31) << (5 * place), firsts)
    # The last character's fifth bit is the sign.
    negative = (codes[last] & 16) != 0
    lengths[negative] -= np.int64(1) << (5 * (place[last][negative] + 1))
    # From the fourth on, each is the difference from the last but one.
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    ends = lengths.cumsum()
    begins, ends = ends[0 : len(ends) - 1 : 2], ends[1::2]
    filled = ends > begins
    return begins[filled], ends[filled]


def window_of(rle: Mapping[str, Any]) -> Window:
    """The smallest window with all pixels of a mask; (0, 0, 0, 0) where it has none."""
    height = int(rle["size"][0])
    begins, ends = runs(rle)
    if len(begins) == 0:
        return 0, 0, 0, 0
    first, last = begins // height, (ends - 1) // height
    if (first != last).any():  # a run that goes on in the next column has its top and bottom pixels
        top, bottom = 0, height
    else:
        top, bottom = int((begins % height).min()), int(((ends - 1) % height).max()) + 1
    return int(first[0]), top, int(last[-1]) + 1, bottom


def crop(rle: Mapping[str, Any], window: Window) -> Bitmap:
    """The pixels of a mask in a window of its image, in memory for the window alone.

    Args:
        rle: as :func:`runs` takes.
        window: inside the image.

    Returns:
        (y1 - y0, x1 - x0), 0 or 1, in C order.
    """
    height = int(rle["size"][0])
    x0, y0, x1, y1 = window
    if x1 <= x0 or y1 <= y0:
        return np.zeros((max(0, y1 - y0), max(0, x1 - x0)), np.uint8)
    column, first, last = _by_column(*runs(rle), height)
    first, last = first.clip(y0, y1) - y0, last.clip(y0, y1) - y0
    kept = (last > first) & (column >= x0) & (column < x1)
    start = (column[kept] - x0) * (y1 - y0)
    changes = np.zeros((x1 - x0) * (y1 - y0) + 1, np.int8)
    # Runs are apart from each other or meet, where +1 and -1 cancel.
    np.add.at(changes, start + first[kept], 1)
    np.add.at(changes, start + last[kept], -1)
    filled = np.cumsum(changes[:-1], dtype=np.int8).view(np.uint8).reshape(x1 - x0, y1 - y0)
    return np.ascontiguousarray(filled.T)


def placed(
    rle: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """A mask of a tile as a mask of the image that the tile was cut from.

    Args:
        rle: of the tile, as :func:`runs` takes.
        corner: (x, y) of the tile's top left pixel in the image; the tile lies inside it.
        size: (H, W) of the image.
    """
    x, y = corner
    height, width = size
    column, first, last = _by_column(*runs(rle), int(rle["size"][0]))
    start = (column + x) * height + y
    return {
        "size": [height, width],
        "counts": to_counts(start + first, start + last, height * width),
    }


def _by_column(
    begins: Positions, ends: Positions, height: int
) -> tuple[Positions, Positions, Positions]:
    """Runs cut where a column ends and the next begins: the column of each, and its rows."""
    first, last = begins // height, (ends - 1) // height
    pieces = last - first + 1
    starts = np.cumsum(pieces) - pieces
    column = np.repeat(first - starts, pieces) + np.arange(int(pieces.sum()))
    begins = np.maximum(np.repeat(begins, pieces) - column * height, 0)
    ends = np.minimum(np.repeat(ends, pieces) - column * height, height)
    return column, begins, ends
