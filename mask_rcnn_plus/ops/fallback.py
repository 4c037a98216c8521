"""The RoI functions through torchvision's operators, where the compiled ones are missing.

Same results within rounding, but for huge boxes on an adaptive grid, which torchvision walks
sample by sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mask_rcnn_plus.ops.arguments import prefers_channels_last
from mask_rcnn_plus.ops.levels import assign_levels


def fpn_roi_align(
    features: list[Tensor],
    rows: Tensor,
    height: int,
    width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    min_level: int,
    canonical_box_size: float,
    canonical_level: int,
) -> Tensor:
    """:func:`mask_rcnn_plus.ops.fpn_roi_align` on checked arguments; ``rows`` is fp32 (R, 5)."""
    from torchvision.ops import roi_align

    def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        if aligned and sampling_ratio <= 0:
            # An inverted box has no samples; torchvision asks for a negative number of them.
            inverted = (boxes[:, 3:] < boxes[:, 1:3]).any(dim=1, keepdim=True)
            empty = torch.nn.functional.pad(boxes[:, :1], (0, 4))
            boxes = torch.where(inverted, empty, boxes)
        return roi_align(feature, boxes, (height, width), scale, sampling_ratio, aligned)

    levels = assign_levels(rows, len(scales), min_level, canonical_box_size, canonical_level)
    return each_level(features, rows, levels, scales, (height, width), pool)


def roi_pool(feature: Tensor, rows: Tensor, output_size: tuple[int, int], scale: float) -> Tensor:
    """:func:`mask_rcnn_plus.ops.roi_pool` on checked arguments; ``rows`` is fp32 (R, 5)."""
    from torchvision.ops import roi_pool as torchvision_roi_pool

    def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        return torchvision_roi_pool(feature, boxes, output_size, scale)

    levels = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    return each_level([feature], rows, levels, [scale], output_size, pool)


def each_level(
    features: list[Tensor],
    rows: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    pool: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Pools every box from its level with an operator that knows one level and fp32 or fp64 only.

    Args:
        features: L maps (N, C, Hl, Wl).
        rows: (R, 5), fp32.
        levels: (R,) index of each box's level.
        scales: L scales, handed to ``pool``.
        output_size: (height, width).
        pool: takes a map, boxes of the map's dtype, and a scale; returns (Ri, C, height, width).

    Returns:
        (R, C, height, width) in the features' dtype; NaN where a box is not finite.

    Raises:
        RuntimeError: a box names an image that the features do not hold.
    """
    images, dtype = features[0].shape[0], features[0].dtype
    index = rows[:, 0]
    bad = (index < 0) | (index >= images) | (index != index.floor())
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"boxes[{row}] names image {index[row].item()}, but the features hold images 0 to "
            f"{images - 1}"
        )
    defined = torch.isfinite(rows).all(dim=1)
    # torchvision has no bf16, and fp16 would round the boxes.
    working = torch.float64 if dtype == torch.float64 else torch.float32
    rows = torch.where(defined[:, None], rows, torch.zeros_like(rows)).to(working)
    out = features[0].new_zeros((len(rows), features[0].shape[1], *output_size), dtype=working)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        chosen = (levels == level).nonzero()[:, 0]
        feature = feature.to(working)
        if feature.numel() > 0:
            # Every level takes part, RoIs or not, so that every map gets a gradient.
            out = out.index_put((chosen,), pool(feature, rows[chosen], scale))
        else:  # torchvision reads out of bounds
            out = out + feature.sum()
    out = torch.where(defined[:, None, None, None], out, torch.nan)
    channels_last = prefers_channels_last(features)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(dtype).contiguous(memory_format=memory_format)
