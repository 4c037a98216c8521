"""The RoI functions.

Boxes are (image index, x0, y0, x1, y1) in input-image pixels. Their geometry and the sums are
computed in fp64 for fp64 features, else in fp32, also under autocast. The output has the features'
dtype and memory format (channels_last or contiguous). Results are the same bit for bit, forward and
backward, in every run and with any number of threads.

Unusual boxes, in every function unless it says otherwise:

- A box with a NaN or infinite coordinate, or so large that this overflows, gives NaN and no
  gradient.
- Samples more than one cell outside the map count as zero, so a box entirely outside gives zeros.
- A box without area, or inverted, gives zeros with an adaptive grid; with a fixed
  ``sampling_ratio`` it is sampled like any other. ``aligned=False`` widens every box to at least
  one cell.
- An adaptive grid has at most 32768 samples per bin and axis.
- A box that names an image which the features do not contain raises a RuntimeError. On CUDA, where
  no function waits for the device to check, it is a device-side assertion that fails the next
  synchronisation.

``mode="max"`` returns the maximum of a bin's samples instead of their average. The first of equal
samples, row by row, gets the gradient. NaN counts as greater than every number. Zeros from outside
the map count, but get no gradient. A bin without samples gives zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.jit.annotations import BroadcastingList2

from mask_rcnn_plus.ops import fallback
from mask_rcnn_plus.ops.arguments import (
    Grid,
    check_canonical,
    check_mode,
    check_sampling,
    first_level,
    prefers_channels_last,
    to_maps,
    to_pair,
    to_rows,
    with_cells,
)
from mask_rcnn_plus.ops.library import has_native, warn_of_fallback


def roi_align(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """RoIAlign (Mask R-CNN, section 3): bins with float borders, sampled bilinearly.

    Arguments and results are torchvision's; its operator pools quantised maps.

    Args:
        input: (N, C, H, W), fp32, fp64, fp16 or bf16.
        boxes: (R, 5), rows of (image index, x0, y0, x1, y1), or a list of (Ri, 4), one per image;
            in input-image pixels.
        output_size: P, or (height, width), in bins.
        spatial_scale: cells of ``input`` per input-image pixel: 1 / stride.
        sampling_ratio: samples per bin and axis; zero or less means the bin's size in cells,
            rounded up.
        aligned: shift boxes by half a cell, so that pixel and cell centres coincide.
        mode: ``"avg"`` or ``"max"`` of a bin's samples.

    Returns:
        (R, C, height, width).

    Raises:
        BoxShapeError: boxes have a wrong shape.
        ValueError: another argument is invalid.
        RuntimeError: a box names an image that ``input`` does not contain.
    """
    if torch.jit.is_scripting():
        grid = 1 if aligned else 0
        return pool_scripted(
            [input], boxes, output_size, [spatial_scale], sampling_ratio, grid, mode
        )
    else:  # noqa: RET505 (without an else, TorchScript would compile this part too)
        if isinstance(input, Tensor) and input.is_quantized and mode == "avg":
            return fallback.quantized_roi_align(
                input, boxes, output_size, spatial_scale, sampling_ratio, aligned
            )
        grid = Grid.ALIGN_HALF if aligned else Grid.ALIGN
        return _pool_one(input, boxes, output_size, spatial_scale, sampling_ratio, grid, mode)


def roi_pool(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """RoIPool (Fast R-CNN, section 2.1): border and bins rounded to cells, then the maximum.

    Arguments are torchvision's, and so are results for finite maps. A NaN in a bin gives NaN here;
    torchvision ignores it. Arguments and errors are as in :func:`roi_align`.

    Returns:
        (R, C, height, width); 0 in bins without a cell.
    """
    if torch.jit.is_scripting():
        return pool_scripted([input], boxes, output_size, [spatial_scale], 0, 3, "max")
    else:  # noqa: RET505
        return _pool_one(input, boxes, output_size, spatial_scale, 0, Grid.POOL, "max")


def roi_warp(
    input: Tensor,
    boxes: Tensor | list[Tensor],
    output_size: BroadcastingList2[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    mode: str = "avg",
) -> Tensor:
    """RoIWarp (Mask R-CNN, table 2c): the border rounded to whole cells, bilinear sampling inside.

    The border is rounded as in RoIPool: from cell round(x0 * scale) to cell round(x1 * scale), both
    included, halves away from zero, and at least one cell. The rectangle of these cells is then
    pooled as :func:`roi_align` pools an aligned box. Arguments, result and errors are as there.
    """
    if torch.jit.is_scripting():
        return pool_scripted([input], boxes, output_size, [spatial_scale], sampling_ratio, 2, mode)
    else:  # noqa: RET505
        return _pool_one(input, boxes, output_size, spatial_scale, sampling_ratio, Grid.WARP, mode)


def fpn_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    mode: str = "avg",
    canonical_box_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """RoIAlign over a feature pyramid, each box on the level for its size, in one operator call.

    The level is FPN's equation 1 with detectron2's rounding:
    ``floor(canonical_level + log2(sqrt(area) / canonical_box_size + 1e-8))``, clamped to the
    existing levels. A box of negative area goes to the finest level.

    Args:
        features: L maps (N, C, Hl, Wl) of one dtype, finest first.
        spatial_scales: L scales, 1 / stride, each half of the previous one.
        canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level's number; a map of stride 2^k has number k.
        boxes, output_size, sampling_ratio, aligned, mode: as in :func:`roi_align`, and so are the
            errors.

    Returns:
        (R, C, height, width).
    """
    grid = Grid.ALIGN_HALF if aligned else Grid.ALIGN
    canonical = (canonical_box_size, canonical_level)
    return pool_pyramid(
        features, boxes, output_size, spatial_scales, sampling_ratio, grid, mode, *canonical
    )


def pool_pyramid(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    grid: Grid,
    mode: str,
    canonical_box_size: float,
    canonical_level: int,
) -> Tensor:
    """:func:`fpn_roi_align` with any grid: also RoIWarp and RoIPool over a pyramid in one call.

    Args:
        grid: how a box is converted to points on its map; ``Grid.POOL`` needs mode ``"max"``.

    The other arguments, the result and the errors are as in :func:`fpn_roi_align`.
    """
    features = to_maps(features)
    if not isinstance(spatial_scales, tuple | list) or len(spatial_scales) != len(features):
        raise ValueError(
            f"{len(features)} feature maps need a list of {len(features)} spatial_scales, got "
            f"{spatial_scales}"
        )
    check_canonical(canonical_box_size, canonical_level)
    pyramid = (
        first_level(spatial_scales) if len(features) > 1 else 0,
        float(canonical_box_size),
        int(canonical_level),
    )
    return _pool(features, boxes, output_size, spatial_scales, sampling_ratio, grid, mode, pyramid)


def _pool_one(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scale: float,
    sampling_ratio: int,
    grid: Grid,
    mode: str,
) -> Tensor:
    features = to_maps([input])
    return _pool(features, boxes, output_size, [scale], sampling_ratio, grid, mode, (0, 1.0, 0))


def _pool(
    features: list[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    grid: Grid,
    mode: str,
    pyramid: tuple[int, float, int],
) -> Tensor:
    rows = to_rows(boxes, features[0])
    check_mode(mode)
    check_sampling(sampling_ratio, scales)
    height, width = to_pair(output_size)
    channels_last = prefers_channels_last(features)
    features = [with_cells(feature) for feature in features]
    arguments = (
        features,
        rows,
        height,
        width,
        [float(scale) for scale in scales],
        int(sampling_ratio),
        int(grid),
        *pyramid,
    )
    if not has_native(rows.device):
        warn_of_fallback(rows.device)
        return fallback.pool_pyramid(*arguments, mode)
    if mode == "max":
        return torch.ops.mask_rcnn_plus.fpn_roi_max(*arguments, channels_last)[0]
    return torch.ops.mask_rcnn_plus.fpn_roi_align(*arguments, channels_last)


def pool_scripted(
    features: list[Tensor],
    boxes: Tensor | list[Tensor],
    output_size: list[int],
    scales: list[float],
    sampling_ratio: int,
    grid: int,
    mode: str,
    min_level: int = 0,
    canonical_box_size: float = 1.0,
    canonical_level: int = 0,
) -> Tensor:
    """:func:`pool_pyramid` for TorchScript; only the compiled operators check the arguments.

    Args:
        min_level: FPN's number of the first map: 2 if it has stride 4.
    """
    dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        rows = boxes.to(dtype)
    else:
        parts: list[Tensor] = []
        for image, part in enumerate(boxes):
            index = torch.full_like(part[:, :1], image).to(dtype)
            parts.append(torch.cat([index, part.to(dtype)], dim=1))
        rows = torch.zeros((0, 5), dtype=dtype, device=features[0].device)
        if parts:
            rows = torch.cat(parts)
    channels_last = False
    for feature in features:
        if feature.is_contiguous(memory_format=torch.channels_last):
            channels_last = channels_last or not feature.is_contiguous()
    if mode == "max":
        pooled, _ = torch.ops.mask_rcnn_plus.fpn_roi_max(
            features,
            rows,
            output_size[0],
            output_size[1],
            scales,
            sampling_ratio,
            grid,
            min_level,
            canonical_box_size,
            canonical_level,
            channels_last,
        )
        return pooled
    assert mode == "avg", "mode must be 'avg' or 'max'"
    return torch.ops.mask_rcnn_plus.fpn_roi_align(
        features,
        rows,
        output_size[0],
        output_size[1],
        scales,
        sampling_ratio,
        grid,
        min_level,
        canonical_box_size,
        canonical_level,
        channels_last,
    )
