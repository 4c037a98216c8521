"""Masks pasted into an image and run-length encoded, without a bitmap of the image.

The compiled operator (csrc/mask_rle.cpp) does the work. Without it, torch and NumPy compute the
same result, in memory for about a million pixels.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mask_rcnn_plus.ops.library import has_native, warn_of_fallback
from mask_rcnn_plus.ops.run_lengths import Positions, encode

_MAX_SIDE = 2**23
_PIXELS_AT_A_TIME = 1 << 20


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Pastes masks into their boxes and encodes them as COCO does (Mask R-CNN, section 3.1).

    The result equals, byte for byte, pycocotools' ``encode`` of detectron2's
    ``paste_masks_in_image`` on the CPU for fp32 masks. A mask is sampled bilinearly at the pixel
    centres within its box and one pixel around it, with zeros beyond its border; a pixel belongs to
    the object where the sample reaches the threshold. Time and memory grow with the area of the
    boxes, not of the image. Masks on a GPU are copied to the CPU while they are still small.

    Unusual arguments:

    - fp16 and bf16 masks are sampled in fp32. detectron2 rounds the sampled positions to the masks'
      dtype, which moves the outline of a large object by pixels. Other dtypes are converted to
      fp32.
    - A box that is inverted, without area or entirely outside the image, or that has a NaN
      coordinate, results in an empty mask. (With ``threshold=0``, the pixels around an empty box
      may count.)

    Args:
        masks: (R, M, M), or with unequal sides; usually probabilities from 0 to 1.
        boxes: (R, 4), rows of (x0, y0, x1, y1) in pixels of the image; converted to fp32.
        image_size: (height, width) of the image in pixels, each 1 to 2^23, and less than 2^32
            pixels in all.
        threshold: 0 or more.

    Returns:
        for each mask ``{"size": [height, width], "counts": bytes}``, for ``pycocotools.mask``.

    Raises:
        ValueError: wrong shapes, or a size or threshold out of range.
    """
    height, width = (int(side) for side in image_size)
    _check(masks, boxes, height, width, threshold)
    masks = masks.detach().to("cpu", torch.float32)
    boxes = boxes.detach().to("cpu", torch.float32)
    if has_native("cpu"):
        code, ends = torch.ops.mask_rcnn_plus.paste_masks_rle(
            masks, boxes, height, width, float(threshold), torch_fuses()
        )
        code, ends = code.numpy().tobytes(), ends.tolist()
        counts = [code[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=False)]
    else:
        warn_of_fallback("cpu")
        counts = [
            encode(*_paste(mask, box, height, width, float(threshold)), height * width)
            for mask, box in zip(masks, boxes, strict=True)
        ]
    return [{"size": [height, width], "counts": count} for count in counts]


def _check(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> None:
    if masks.dim() != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must have shape (R, M, M), got {tuple(masks.shape)}")
    if boxes.shape != (len(masks), 4):
        raise ValueError(
            f"boxes must have shape ({len(masks)}, 4), one (x0, y0, x1, y1) per mask; got "
            f"{tuple(boxes.shape)}"
        )
    if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE and height * width < 2**32):
        raise ValueError(
            "image_size must be (height, width), each 1 to 2^23, and less than 2^32 pixels; got "
            f"{(height, width)}"
        )
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, got {threshold}")


@functools.cache
def torch_fuses() -> bool:
    """Whether torch's bilinear sampling on this CPU uses fused multiply-add, which rounds once.

    That depends on how torch was compiled: on x86, it does so with AVX2 or AVX-512. To find out,
    this compares a thousand samples with both computations.
    """
    grid = torch.linspace(-0.8, 0.8, 1001)
    ramp = torch.linspace(0, 1, 7).square().expand(1, 1, 7, 7).contiguous()
    points = torch.stack([grid, torch.zeros_like(grid)], dim=1)[None, None]
    with torch.autocast("cpu", enabled=False):
        sampled = torch.nn.functional.grid_sample(ramp, points, align_corners=False).flatten()
    cells = ramp[0, 0, 0]

    def interpolated(fused: bool) -> Tensor:
        def multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            # The product of two fp32 numbers is exact in fp64.
            return (a.double() * b.double() + c.double()).float() if fused else a * b + c

        at = multiply_add(grid + 1, torch.tensor(3.5), torch.tensor(-0.5))
        west = at.floor().long()
        east_weight = at - at.floor()
        # All points are exactly on a row, so the row below has the weight 0.
        value = cells[west] * (1 - east_weight)
        return multiply_add(cells[west + 1], east_weight, value)

    wrong = [int((interpolated(fused) != sampled).sum()) for fused in (False, True)]
    return wrong[1] < wrong[0]


def _paste(
    mask: Tensor, box: Tensor, height: int, width: int, threshold: float
) -> tuple[Positions, Positions]:
    """The runs of ones of one pasted mask, column by column, as :func:`encode` expects them."""
    empty = np.zeros(0, np.int64)
    if box.isnan().any():
        return empty, empty
    (top, bottom), (left, right) = _span(box[1::2], height), _span(box[0::2], width)
    if top >= bottom or left >= right:
        return empty, empty
    y = _to_mask_coordinates(torch.arange(top, bottom), box[1], box[3])
    step = max(1, _PIXELS_AT_A_TIME // (bottom - top))
    begins: list[Positions] = []
    ends: list[Positions] = []
    for first in range(left, right, step):
        columns = torch.arange(first, min(right, first + step))
        x = _to_mask_coordinates(columns, box[0], box[2])
        # (1, columns, rows, 2), so that the samples are in column order.
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
    """The first pixel and the end of a box's pixels, with one more on each side."""
    start, end = sides.tolist()
    first = max(math.floor(start) - 1, 0) if math.isfinite(start) else 0 if start < 0 else image
    last = min(math.ceil(end) + 1, image) if math.isfinite(end) else image if end > 0 else 0
    return first, last


def _to_mask_coordinates(pixels: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Pixel centres in grid_sample's coordinates: -1 at the box's start, 1 at its end."""
    return (pixels.float() + 0.5 - start) / (end - start) * 2 - 1
