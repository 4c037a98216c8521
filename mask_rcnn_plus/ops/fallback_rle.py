"""Masks pasted and run-length encoded by torch and NumPy, where the compiled operators are missing.

The same results, since the samples are torch's own; memory for about a million pixels.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Positions = npt.NDArray[np.int64]

_PIXELS_AT_A_TIME = 1 << 20


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float
) -> list[bytes]:
    """:func:`mask_rcnn_plus.ops.mask_rle.paste_masks_rle` on checked fp32 tensors of the CPU.

    Returns:
        the "counts" of each mask.
    """
    return [
        to_counts(*_runs(mask, box, height, width, threshold), height * width)
        for mask, box in zip(masks, boxes, strict=True)
    ]


def to_counts(begins: Positions, ends: Positions, pixels: int) -> bytes:
    """COCO's compressed run lengths.

    Args:
        begins, ends: (K,), the runs of ones in an image read column by column: begin <= position
            < end, in order; a run may begin where the one before ends.
        pixels: of the image.
    """
    apart = begins[1:] != ends[:-1]
    begins = np.concatenate([begins[:1], begins[1:][apart]])
    ends = np.concatenate([ends[:-1][apart], ends[-1:]])
    changes = np.stack([begins, ends], axis=1).ravel()
    if changes.size == 0 or changes[-1] != pixels:
        changes = np.append(changes, pixels)
    lengths = np.diff(changes, prepend=0)
    # From the fourth on, the difference from the last but one.
    lengths[3:] -= lengths[1:-2].copy()
    # Five bits at a time, least first; a group is the last where the rest is its sign.
    shifted = lengths[:, None] >> (5 * np.arange(8))
    groups = shifted & 31
    rest = shifted >> 5
    more = np.where(groups & 16, rest != -1, rest != 0)
    needed = np.ones_like(more)
    needed[:, 1:] = np.logical_and.accumulate(more[:, :-1], axis=1)
    return (48 + groups + 32 * more)[needed].astype(np.uint8).tobytes()


def _runs(
    mask: Tensor, box: Tensor, height: int, width: int, threshold: float
) -> tuple[Positions, Positions]:
    """The runs of ones of one pasted mask, column by column."""
    none = np.zeros(0, np.int64)
    if box.isnan().any():
        return none, none
    (top, bottom), (left, right) = _span(box[1::2], height), _span(box[0::2], width)
    if top >= bottom or left >= right:
        return none, none
    y = _to_mask(torch.arange(top, bottom), box[1], box[3])
    step = max(1, _PIXELS_AT_A_TIME // (bottom - top))
    begins: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    for first in range(left, right, step):
        columns = torch.arange(first, min(right, first + step))
        x = _to_mask(columns, box[0], box[2])
        # (1, columns, rows, 2), so that what is sampled lies column by column.
        grid = torch.stack([x[:, None].expand(-1, len(y)), y.expand(len(x), -1)], dim=2)[None]
        with torch.autocast("cpu", enabled=False):
            sampled = torch.nn.functional.grid_sample(mask[None, None], grid, align_corners=False)
        reached = np.zeros((len(x), len(y) + 2), np.int8)
        reached[:, 1:-1] = (sampled[0, 0] >= threshold).numpy()
        changes = np.diff(reached, axis=1)
        for edges, sign in ((begins, 1), (ends, -1)):
            column, row = np.nonzero(changes == sign)
            edges.append((first + column) * height + top + row)
    return np.concatenate(begins), np.concatenate(ends)


def _span(sides: Tensor, image: int) -> tuple[int, int]:
    """First pixel, and the one beyond the last: those of the box and one on each side of it."""
    start, end = sides.tolist()
    first = max(math.floor(start) - 1, 0) if math.isfinite(start) else 0 if start < 0 else image
    last = min(math.ceil(end) + 1, image) if math.isfinite(end) else image if end > 0 else 0
    return first, last


def _to_mask(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Centres of pixels as grid_sample counts: -1 at the box's start, 1 at its end."""
    return (pixels.float() + 0.5 - start) / (end - start) * 2 - 1
