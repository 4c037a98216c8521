"""The RoI functions.

Boxes are (image index, x0, y0, x1, y1) in input-image pixels, always worked on in fp32, whatever
the features' dtype; sums are made in fp32 (fp64 for fp64 features). The output has the features'
dtype and memory format (channels_last or contiguous). Results repeat bit for bit, forward and
backward, at any thread count.

Unusual boxes, in every function unless it says otherwise:

- A box with a NaN or infinite coordinate, or one so large that fp32 overflows, gives NaN, and no
  gradient.
- Samples further than one cell outside the map count as zero, so a box wholly outside gives zeros.
- A box with no area, or inverted, gives zeros with an adaptive grid; with a fixed
  ``sampling_ratio`` it is sampled as it stands. ``aligned=False`` widens every box to one cell.
- An adaptive grid has at most 32768 samples a bin and axis.
- A box that names an image the features do not hold is a RuntimeError; on CUDA, where nobody waits
  for the device to look, a device-side assertion that fails the next synchronisation.

``mode="max"`` takes the greatest of a bin's samples instead of their average. Of equal ones the
first, row by row, gets the gradient. NaN is greater than every number. Zeros from outside the map
count, but have no gradient. A bin without samples gives zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.jit.annotations import BroadcastingList2

from mask_rcnn_plus.ops import fallback, operators, scripted
from mask_rcnn_plus.ops.arguments import (
    Grid,
    check_canonical,
    check_features,
    check_maps,
    check_mode,
    check_sampling,
    first_level,
    prefers_channels_last,
    to_autocast_dtype,
    to_pair,
    to_rows,
    with_cells,
)
from mask_rcnn_plus.ops.library import has_native, warn_of_fallback

if has_native("cpu"):
    operators.register()


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

    Takes torchvision's arguments and gives its results; quantised maps go to its own operator.

    Args:
        input: (N, C, H, W), fp32, fp64, fp16 or bf16.
        boxes: (R, 5), rows of (image index, x0, y0, x1, y1), or a list of (Ri, 4), one an image;
            in input-image pixels.
        output_size: P, or (height, width), in bins.
        spatial_scale: cells of ``input`` for each input-image pixel: 1 / stride.
        sampling_ratio: samples a bin along each axis; zero or less takes as many as the bin is
            cells wide, rounded up.
        aligned: shift boxes by half a cell, so that pixel and cell centres coincide.
        mode: ``"avg"`` or ``"max"`` of a bin's samples.

    Returns:
        (R, C, height, width).

    Raises:
        BoxShapeError: boxes have a wrong shape.
        ValueError: another argument does not fit.
        RuntimeError: a box names an image that ``input`` does not hold.
    """
    if torch.jit.is_scripting():
        return scripted.pool_one(
            input, boxes, output_size, spatial_scale, sampling_ratio, 1 if aligned else 0, mode
        )
    else:  # noqa: RET505 (TorchScript compiles what is not within an else)
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

    Takes torchvision's arguments and gives its results on finite maps. A NaN in a bin gives NaN
    here, where torchvision passes over it.

    Args:
        input: (N, C, H, W), fp32, fp64, fp16 or bf16.
        boxes: as in :func:`roi_align`.
        output_size: P, or (height, width), in bins.
        spatial_scale: cells of ``input`` for each input-image pixel: 1 / stride.

    Returns:
        (R, C, height, width); 0 in bins without a cell.

    Raises:
        BoxShapeError: boxes have a wrong shape.
        ValueError: another argument does not fit.
        RuntimeError: a box names an image that ``input`` does not hold.
    """
    if torch.jit.is_scripting():
        return scripted.pool_one(input, boxes, output_size, spatial_scale, 0, 3, "max")
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

    The border is rounded as RoIPool rounds it: from cell round(x0 * scale) to cell
    round(x1 * scale), both included, halves away from zero, and at least one cell. The cells'
    square is then pooled as :func:`roi_align` pools an aligned box.

    Args:
        input: (N, C, H, W), fp32, fp64, fp16 or bf16.
        boxes: as in :func:`roi_align`.
        output_size: P, or (height, width), in bins.
        spatial_scale: cells of ``input`` for each input-image pixel: 1 / stride.
        sampling_ratio: as in :func:`roi_align`.
        mode: ``"avg"`` or ``"max"`` of a bin's samples.

    Returns:
        (R, C, height, width).

    Raises:
        BoxShapeError: boxes have a wrong shape.
        ValueError: another argument does not fit.
        RuntimeError: a box names an image that ``input`` does not hold.
    """
    if torch.jit.is_scripting():
        return scripted.pool_one(input, boxes, output_size, spatial_scale, sampling_ratio, 2, mode)
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
    """RoIAlign over a feature pyramid, each box on the level of its size, in one operator call.

    The level is FPN's equation 1 with detectron2's rounding:
    ``floor(canonical_level + log2(sqrt(area) / canonical_box_size + 1e-8))``, clamped to the
    levels there are. A box of negative area goes to the finest level.

    Args:
        features: L maps (N, C, Hl, Wl) of one dtype, finest first.
        boxes: as in :func:`roi_align`.
        output_size: P, or (height, width), in bins.
        spatial_scales: L scales, 1 / stride, each half of the one before.
        sampling_ratio: as in :func:`roi_align`.
        aligned: as in :func:`roi_align`.
        mode: as in :func:`roi_align`.
        canonical_box_size: side, in pixels, of a box that belongs to ``canonical_level``.
        canonical_level: that level's number; a map of stride 2^k has number k.

    Returns:
        (R, C, height, width).

    Raises:
        BoxShapeError: boxes have a wrong shape.
        ValueError: another argument does not fit.
        RuntimeError: a box names an image that the features do not hold.
    """
    grid = Grid.ALIGN_HALF if aligned else Grid.ALIGN
    return pool_pyramid(
        features,
        boxes,
        output_size,
        spatial_scales,
        sampling_ratio,
        grid,
        mode,
        canonical_box_size,
        canonical_level,
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
    """:func:`fpn_roi_align` with any grid: RoIWarp and RoIPool over a pyramid in one call too.

    Args:
        grid: how a box becomes points on its map; ``Grid.POOL`` goes with ``"max"`` alone.

    The other arguments, the result and the errors are those of :func:`fpn_roi_align`.
    """
    features, rows = _prepare(features, boxes)
    if not isinstance(spatial_scales, tuple | list) or len(spatial_scales) != len(features):
        raise ValueError(
            f"{len(features)} feature maps need a list of as many spatial_scales, got "
            f"{spatial_scales}"
        )
    check_canonical(canonical_box_size, canonical_level)
    pyramid = (
        first_level(spatial_scales) if len(features) > 1 else 0,
        float(canonical_box_size),
        int(canonical_level),
    )
    return _pool(features, rows, output_size, spatial_scales, sampling_ratio, grid, mode, pyramid)


def _pool_one(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scale: float,
    sampling_ratio: int,
    grid: Grid,
    mode: str,
) -> Tensor:
    features, rows = _prepare([input], boxes)
    return _pool(features, rows, output_size, [scale], sampling_ratio, grid, mode, (0, 1.0, 0))


def _prepare(
    features: Sequence[Tensor], boxes: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], Tensor]:
    check_maps(features)
    features = to_autocast_dtype(features)
    check_features(features)
    return features, to_rows(boxes, features[0])


def _pool(
    features: list[Tensor],
    rows: Tensor,
    output_size: int | Sequence[int],
    scales: Sequence[float],
    sampling_ratio: int,
    grid: Grid,
    mode: str,
    pyramid: tuple[int, float, int],
) -> Tensor:
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
    if not has_native(rows.device.type):
        warn_of_fallback(rows.device.type)
        return fallback.pool_pyramid(*arguments, mode)
    if mode == "max":
        return torch.ops.mask_rcnn_plus.fpn_roi_max(*arguments, channels_last)[0]
    return torch.ops.mask_rcnn_plus.fpn_roi_align(*arguments, channels_last)
