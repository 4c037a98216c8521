"""COCO's run lengths, encoded, decoded, cropped and moved without a bitmap of the image.

pycocotools decodes a mask into all pixels of its image; an object in a large image fills few.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
Bitmap = npt.NDArray[np.uint8]
# (x0, y0, x1, y1) in whole pixels of the image; x1 and y1 are excluded.
Window = tuple[int, int, int, int]


def encode(begins: Positions, ends: Positions, pixels: int) -> bytes:
    """COCO's compressed run lengths.

    Args:
        begins, ends: (K,), the runs of ones in an image read column by column: begin <= position
            < end, in order; a run may begin where the previous one ends.
        pixels: number of pixels of the image.
    """
    apart = begins[1:] != ends[:-1]
    begins = np.concatenate([begins[:1], begins[1:][apart]])
    ends = np.concatenate([ends[:-1][apart], ends[-1:]])
    changes = np.stack([begins, ends], axis=1).ravel()
    if changes.size == 0 or changes[-1] != pixels:
        changes = np.append(changes, pixels)
    lengths = np.diff(changes, prepend=0)
    # From the fourth length on, COCO stores the difference from the last but one.
    lengths[3:] -= lengths[1:-2].copy()
    # Groups of five bits, least significant first. A group is the last if the rest is its sign.
    shifted = lengths[:, None] >> (5 * np.arange(8))
    groups = shifted & 31
    rest = shifted >> 5
    more = np.where(groups & 16, rest != -1, rest != 0)
    needed = np.ones_like(more)
    needed[:, 1:] = np.logical_and.accumulate(more[:, :-1], axis=1)
    return (48 + groups + 32 * more)[needed].astype(np.uint8).tobytes()


def decode(rle: Mapping[str, Any]) -> tuple[Positions, Positions]:
    """The start and end of each run of ones in a mask, in the image read column by column.

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
    # Five bits per character, least significant first; the sixth says that more follow.
    last = (codes & 32) == 0
    firsts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(codes)) - np.repeat(firsts, np.diff(np.append(firsts, len(codes))))
    lengths = np.add.reduceat((codes & 31) << (5 * place), firsts)
    # The last character's fifth bit is the sign.
    negative = (codes[last] & 16) != 0
    lengths[negative] -= np.int64(1) << (5 * (place[last][negative] + 1))
    # From the fourth length on, each is the difference from the last but one.
    lengths[1::2] = lengths[1::2].cumsum()
    lengths[2::2] = lengths[2::2].cumsum()
    ends = lengths.cumsum()
    begins, ends = ends[0 : len(ends) - 1 : 2], ends[1::2]
    filled = ends > begins
    return begins[filled], ends[filled]


def window_of(rle: Mapping[str, Any]) -> Window:
    """The smallest window that contains all pixels of a mask; (0, 0, 0, 0) if it is empty."""
    height = int(rle["size"][0])
    begins, ends = decode(rle)
    if len(begins) == 0:
        return 0, 0, 0, 0
    first, last = begins // height, (ends - 1) // height
    if (first != last).any():  # a run over two columns contains a bottom and a top pixel
        top, bottom = 0, height
    else:
        top, bottom = int((begins % height).min()), int(((ends - 1) % height).max()) + 1
    return int(first[0]), top, int(last[-1]) + 1, bottom


def crop(rle: Mapping[str, Any], window: Window) -> Bitmap:
    """The pixels of a mask in a window, in memory proportional to the window.

    Args:
        rle: as in :func:`decode`.
        window: inside the image.

    Returns:
        (y1 - y0, x1 - x0), 0 or 1, in C order.
    """
    height = int(rle["size"][0])
    x0, y0, x1, y1 = window
    if x1 <= x0 or y1 <= y0:
        return np.zeros((max(0, y1 - y0), max(0, x1 - x0)), np.uint8)
    column, first, last = _split_by_column(*decode(rle), height)
    first, last = first.clip(y0, y1) - y0, last.clip(y0, y1) - y0
    kept = (last > first) & (column >= x0) & (column < x1)
    start = (column[kept] - x0) * (y1 - y0)
    changes = np.zeros((x1 - x0) * (y1 - y0) + 1, np.int8)
    # Where one run ends and the next begins, +1 and -1 cancel.
    np.add.at(changes, start + first[kept], 1)
    np.add.at(changes, start + last[kept], -1)
    filled = np.cumsum(changes[:-1], dtype=np.int8).view(np.uint8).reshape(x1 - x0, y1 - y0)
    return np.ascontiguousarray(filled.T)


def placed(
    rle: Mapping[str, Any], corner: tuple[int, int], size: tuple[int, int]
) -> dict[str, Any]:
    """The mask of a tile as a mask of the whole image.

    Args:
        rle: the run lengths of the tile, as in :func:`decode`.
        corner: (x, y) of the tile's top left pixel in the image; the tile is inside the image.
        size: (H, W) of the image.
    """
    x, y = corner
    height, width = size
    column, first, last = _split_by_column(*decode(rle), int(rle["size"][0]))
    start = (column + x) * height + y
    counts = encode(start + first, start + last, height * width)
    return {"size": [height, width], "counts": counts}


def _split_by_column(
    begins: Positions, ends: Positions, height: int
) -> tuple[Positions, Positions, Positions]:
    """Splits runs where a column ends; returns the column of each piece and its rows."""
    first, last = begins // height, (ends - 1) // height
    pieces = last - first + 1
    starts = np.cumsum(pieces) - pieces
    column = np.repeat(first - starts, pieces) + np.arange(int(pieces.sum()))
    begins = np.maximum(np.repeat(begins, pieces) - column * height, 0)
    ends = np.minimum(np.repeat(ends, pieces) - column * height, height)
    return column, begins, ends
