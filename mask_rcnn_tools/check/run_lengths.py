"""Run lengths (RLE) of many masks at once: whether they fill their image, their box and area."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mask_rcnn_plus.data.mask_rules import rle_fault, run_lengths

Floats = npt.NDArray[np.float64]


def measure_rles(
    rles: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]]
) -> tuple[list[str], Floats, Floats]:
    """Checks and measures masks.

    Args:
        rles: R masks as the json has them.
        sizes: (height, width) of each one's image.

    Returns:
        each one's fault, as ``rle_fault`` words it, or ""; boxes (R, 4): x0, y0, x1, y1 in pixels;
        and areas (R,) in pixels. A mask with a fault, or without a pixel, has a box of NaN and the
        area 0.
    """
    faults = [""] * len(rles)
    boxes = np.full((len(rles), 4), np.nan)
    areas = np.zeros(len(rles))
    packed: list[int] = []
    rest: list[int] = []
    for number, rle in enumerate(rles):
        simple = rle.get("size") == list(sizes[number]) and isinstance(rle.get("counts"), str)
        (packed if simple and rle["counts"].isascii() and rle["counts"] else rest).append(number)
    runs = _unpack([rles[number]["counts"] for number in packed])
    if runs is None:  # one of them is malformed: let each say for itself
        rest, packed = sorted(packed + rest), []
        runs = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    counts, starts = runs
    chosen = list(packed)
    if packed:
        heights = np.array([sizes[number][0] for number in packed])
        widths = np.array([sizes[number][1] for number in packed])
        good = np.add.reduceat(counts, starts) == heights * widths
        good &= np.minimum.reduceat(counts, starts) >= 0
        rest = sorted(rest + [number for number, ok in zip(packed, good, strict=True) if not ok])
        spans = np.diff(np.append(starts, len(counts)))
        counts = counts[np.repeat(good, spans)]
        chosen = [number for number, ok in zip(packed, good, strict=True) if ok]
        spans = spans[good]
    else:
        spans = np.zeros(0, np.int64)
    lists = []
    for number in rest:
        faults[number] = rle_fault(rles[number], list(sizes[number]))
        if not faults[number]:
            values = run_lengths(rles[number]) or [0]
            lists.append(np.array(values, np.int64))
            chosen.append(number)
    counts = np.concatenate([counts, *lists])
    spans = np.concatenate([spans, np.array([len(part) for part in lists], np.int64)])
    if chosen:
        heights = np.array([sizes[number][0] for number in chosen])
        boxes[chosen], areas[chosen] = _measure(counts, spans, heights)
    return faults, boxes, areas


def _unpack(texts: list[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """All run lengths in a row and where each text's begin; None if one is malformed.

    The encoding: see ``mask_rules``.
    """
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    codes = np.frombuffer("".join(texts).encode("ascii"), np.uint8).astype(np.int64) - 48
    lengths = np.array([len(text) for text in texts])
    ends = np.cumsum(lengths)
    last = (codes & 32) == 0
    if codes.min() < 0 or codes.max() > 63 or not last[ends - 1].all():
        return None
    tails = np.flatnonzero(last)  # of each number
    heads = np.append(0, tails[:-1] + 1)
    if (tails - heads).max() > 6:  # more than 35 bits, whose sums might run over
        return None
    place = np.arange(len(codes)) - np.repeat(heads, tails - heads + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), heads)
    negative = (codes[tails] & 16) != 0
    values -= np.where(negative, np.int64(1) << (5 * (tails - heads + 1)), 0)
    # The differences to the last but one, summed: odd places of a mask from 1 on, even from 2 on.
    spans = np.diff(np.append(0, np.searchsorted(tails, ends - 1) + 1))
    starts = np.cumsum(spans) - spans
    rank = np.arange(len(values)) - np.repeat(starts, spans)
    for parity in (0, 1):
        mine = np.flatnonzero((rank % 2 == parity) & (rank > 0))
        if not len(mine):
            continue
        total = np.cumsum(values[mine])
        first = np.flatnonzero(rank[mine] == (2 if parity == 0 else 1))
        before = total[first] - values[mine][first]
        values[mine] = total - np.repeat(before, np.diff(np.append(first, len(mine))))
    return values, starts


def _measure(
    counts: npt.NDArray[np.int64], spans: npt.NDArray[np.int64], heights: npt.NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """Boxes and areas of masks that fill their image; pixels count down the columns."""
    starts = np.cumsum(spans) - spans
    rank = np.arange(len(counts)) - np.repeat(starts, spans)
    total = np.cumsum(counts)
    stops = total - np.repeat(total[starts] - counts[starts], spans)
    begins = stops - counts
    on = (rank % 2 == 1) & (counts > 0)
    height = np.repeat(heights, spans)
    first, final = begins // height, (stops - 1) // height
    one = first == final
    far = np.int64(2**62)
    x0 = np.where(on, first, far)
    x1 = np.where(on, final + 1, -far)
    y0 = np.where(on, np.where(one, begins % height, 0), far)
    y1 = np.where(on, np.where(one, (stops - 1) % height + 1, height), -far)
    boxes = np.stack(
        [
            np.minimum.reduceat(x0, starts),
            np.minimum.reduceat(y0, starts),
            np.maximum.reduceat(x1, starts),
            np.maximum.reduceat(y1, starts),
        ],
        axis=1,
    ).astype(np.float64)
    areas = np.add.reduceat(np.where(on, counts, 0), starts).astype(np.float64)
    boxes[areas == 0] = np.nan
    return boxes, areas
