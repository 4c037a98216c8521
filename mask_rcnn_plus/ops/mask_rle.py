"""Masks pasted into an image and run-length encoded, without an image of a mask in between."""

import functools
from typing import Any

import torch
from torch import Tensor

from mask_rcnn_plus.ops import fallback_rle
from mask_rcnn_plus.ops.library import has_native, warn_of_fallback

_MAX_SIDE = 2**23


def paste_masks_rle(
    masks: Tensor, boxes: Tensor, image_size: tuple[int, int], threshold: float = 0.5
) -> list[dict[str, Any]]:
    """Pastes masks into their boxes and encodes them as COCO does (Mask R-CNN, section 3.1).

    Gives, byte for byte, what pycocotools' ``encode`` makes of detectron2's
    ``paste_masks_in_image`` on the CPU for fp32 masks: a mask is sampled bilinearly at the pixel
    centres within its box and a pixel around it, zero beyond its border, and a pixel belongs to the
    object where the sample reaches the threshold. Time and memory grow with what the boxes hold,
    never with the image. Masks of a GPU are brought to the CPU, as they are: small.

    Unusual arguments:

    - fp16 and bf16 masks are sampled in fp32, where detectron2 rounds the places of the samples to
      the masks' dtype, and so moves the outline of a large object by pixels; any other dtype is
      converted to fp32.
    - A box that is inverted, without area or wholly outside the image, or that has a NaN
      coordinate, gives an empty mask (with ``threshold=0`` the pixels around an empty box may
      count).

    Args:
        masks: (R, M, M), or of unequal sides; usually probabilities from 0 to 1.
        boxes: (R, 4), rows of (x0, y0, x1, y1) in pixels of the image; worked on in fp32.
        image_size: (height, width) of the image in pixels, each 1 to 2^23, and less than 2^32
            pixels in all.
        threshold: 0 or more.

    Returns:
        for each mask ``{"size": [height, width], "counts": bytes}``, for ``pycocotools.mask``.

    Raises:
        ValueError: shapes, sizes or the threshold do not fit.
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
        counts = fallback_rle.paste_masks_rle(masks, boxes, height, width, float(threshold))
    return [{"size": [height, width], "counts": count} for count in counts]


def _check(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float) -> None:
    if masks.dim() != 3 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must have shape (R, M, M), got {tuple(masks.shape)}")
    if boxes.shape != (len(masks), 4):
        raise ValueError(
            f"{len(masks)} masks need boxes of shape ({len(masks)}, 4): (x0, y0, x1, y1); got "
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
    """Whether torch's bilinear sampling on this CPU rounds a product and a sum once, or twice.

    That is how its compiler translated it for the processor: on x86 once with AVX2 or AVX-512, and
    twice without. Found out by sampling a thousand points and working them out both ways.
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
        # All points lie exactly on a row, so the one below has the weight 0.
        value = cells[west] * (1 - east_weight)
        return multiply_add(cells[west + 1], east_weight, value)

    wrong = [int((interpolated(fused) != sampled).sum()) for fused in (False, True)]
    return wrong[1] < wrong[0]
