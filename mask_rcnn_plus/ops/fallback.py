"""The RoI functions through torchvision's operators, where the compiled ones are missing.

Same results within rounding, but for huge boxes on an adaptive grid, which torchvision walks
sample by sample.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assign_levels(
    rows: Tensor, levels: int, min_level: int, canonical_box_size: float, canonical_level: int
) -> Tensor:
    """The level of each box (FPN, equation 1, with detectron2's rounding).

    Args:
        rows: (R, 5), in input-image pixels.
        levels: how many maps there are.
        min_level: the number of the first.
        canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level's number.

    Returns:
        (R,) int64 in [0, levels).
    """
    area = (rows[:, 3] - rows[:, 1]) * (rows[:, 4] - rows[:, 2])
    side = area.clamp(min=0).nan_to_num(0.0).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_box_size + 1e-8))
    return (level - min_level).clamp(0, levels - 1).long()


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
        return roi_align(feature, boxes, (height, width), scale, sampling_ratio, aligned)

    levels = assign_levels(rows, len(scales), min_level, canonical_box_size, canonical_level)
    return _each_level(features, rows, levels, scales, (height, width), pool)


def _each_level(
    features: list[Tensor],
    rows: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    pool: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
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
        # Every level takes part, RoIs or not, so that every map gets a gradient.
        out = out.index_put((chosen,), pool(feature.to(working), rows[chosen], scale))
    out = torch.where(defined[:, None, None, None], out, torch.nan)
    return out.to(dtype)
