"""The RoI functions through torchvision's operators, if the compiled ones are missing.

The results are the same up to rounding. Huge boxes on an adaptive grid are very slow, since
torchvision computes every sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from mask_rcnn_plus.ops.arguments import Grid, prefers_channels_last


def pool_pyramid(
    features: list[Tensor],
    rows: Tensor,
    height: int,
    width: int,
    scales: Sequence[float],
    sampling_ratio: int,
    grid: int,
    min_level: int,
    canonical_box_size: float,
    canonical_level: int,
    mode: str,
) -> Tensor:
    """:func:`mask_rcnn_plus.ops.roi_ops.pool_pyramid` for checked arguments; rows: (R, 5)."""
    from torchvision.ops import roi_align, roi_pool

    def pool(feature: Tensor, boxes: Tensor, scale: float) -> Tensor:
        size = (height, width)
        if grid == Grid.POOL:
            return roi_pool(feature, boxes, size, scale)
        if grid == Grid.WARP:
            boxes, scale = _to_whole_cells(boxes, scale), 1.0
        aligned = grid != Grid.ALIGN
        if mode == "max":
            return _max_sample(feature, boxes, size, scale, sampling_ratio, aligned)
        if aligned and sampling_ratio <= 0:
            # An inverted box has no samples; torchvision computes a negative number of them.
            inverted = (boxes[:, 3:] < boxes[:, 1:3]).any(dim=1, keepdim=True)
            empty = torch.nn.functional.pad(boxes[:, :1], (0, 4))
            boxes = torch.where(inverted, empty, boxes)
        return roi_align(feature, boxes, size, scale, sampling_ratio, aligned)

    levels = assign_levels(rows, len(scales), min_level, canonical_box_size, canonical_level)
    return _pool_by_level(features, rows, levels, scales, (height, width), pool)


def quantized_roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """torchvision's RoIAlign of a quantised map; the result is quantised too."""
    from torchvision.ops import roi_align

    return roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, aligned)


def _to_whole_cells(boxes: Tensor, scale: float) -> Tensor:
    """Boxes (R, 5) in pixels to RoIWarp's boxes, in whole cells."""
    scaled = boxes[:, 1:] * scale
    whole = scaled.trunc()
    whole = whole + ((scaled - whole).abs() >= 0.5) * scaled.sign()
    first = whole[:, :2]
    beyond = torch.maximum(whole[:, 2:], first) + 1
    return torch.cat([boxes[:, :1], first, beyond], dim=1)


def _max_sample(
    feature: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The maximum of each bin's samples: one bin per sample, then the maximum over those bins.

    It needs memory for every sample of all boxes with the same grid.
    """
    from torchvision.ops import roi_align

    length = (boxes[:, 3:] - boxes[:, 1:3]) * scale
    if not aligned:
        length = length.clamp(min=1)
    samples = (length / length.new_tensor([size[1], size[0]])).ceil().clamp(min=0).long()
    if sampling_ratio > 0:
        samples = torch.full_like(samples, sampling_ratio)
    # An empty sum connects the result to the map's graph, even if no box has a sample.
    out = feature.new_zeros((len(boxes), feature.shape[1], *size)) + feature[..., :0].sum()
    for across, down in samples.unique(dim=0).tolist():
        if across and down:
            chosen = (samples == samples.new_tensor([across, down])).all(dim=1).nonzero()[:, 0]
            fine = (size[0] * down, size[1] * across)
            each = roi_align(feature, boxes[chosen], fine, scale, 1, aligned)
            out = out.index_put((chosen,), max_pool2d(each, (down, across)))
    return out


def _pool_by_level(
    features: list[Tensor],
    rows: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    pool: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """Pools each box (R, 5) from its level (R,) by ``pool(map, boxes, scale)``, in fp32 or fp64.

    The result (R, C, height, width) has the features' dtype, and NaN for boxes that are not finite.
    """
    images, dtype = features[0].shape[0], features[0].dtype
    index = rows[:, 0]
    bad = (index < 0) | (index >= images) | (index != index.floor())
    if bad.any():
        row = int(bad.nonzero()[0])
        raise RuntimeError(
            f"boxes[{row}] names image {index[row].item()}, but the features contain images 0 to "
            f"{images - 1}"
        )
    defined = torch.isfinite(rows).all(dim=1)
    # torchvision does not support bf16, and in fp16 it would round the boxes.
    working = torch.float64 if dtype == torch.float64 else torch.float32
    rows = torch.where(defined[:, None], rows, torch.zeros_like(rows)).to(working)
    out = features[0].new_zeros((len(rows), features[0].shape[1], *output_size), dtype=working)
    for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        chosen = (levels == level).nonzero()[:, 0]
        feature = feature.to(working)
        if feature.numel() > 0:
            # Even without RoIs, so that every map gets a gradient.
            out = out.index_put((chosen,), pool(feature, rows[chosen], scale))
        else:  # torchvision would read out of bounds
            out = out + feature.sum()
    out = torch.where(defined[:, None, None, None], out, torch.nan)
    channels_last = prefers_channels_last(features)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(dtype).contiguous(memory_format=memory_format)


def assign_levels(
    rows: Tensor, levels: int, min_level: int, canonical_box_size: float, canonical_level: int
) -> Tensor:
    """The level of each box (R, 5), from 0 to ``levels`` - 1 (FPN, equation 1, as in detectron2).

    A map of stride 2^k has the number k; ``min_level`` is the first map's number.
    """
    area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    side = area.clamp(min=0).nan_to_num(0.0).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_box_size + 1e-8))
    return (level - min_level).clamp(0, levels - 1).long()
