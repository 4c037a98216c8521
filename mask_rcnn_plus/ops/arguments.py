"""The arguments of RoI functions: brought into the one form the operators take, or refused."""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Grid(enum.IntEnum):
    """How a box becomes a grid of points on a map; ``roi::Grid`` in csrc/roi_math.h."""

    ALIGN = 0
    ALIGN_HALF = 1
    WARP = 2
    POOL = 3


MODES = ("avg", "max")


def check_mode(mode: str) -> None:
    """Refuses a mode that is neither ``"avg"`` nor ``"max"``.

    Raises:
        ValueError: it is neither.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be 'avg' or 'max', got {mode!r}")


class BoxShapeError(ValueError, AssertionError):
    """Boxes of a wrong shape.

    A ValueError, and an AssertionError because that is what torchvision's functions raise.
    """


def check_features(features: Sequence[Tensor]) -> None:
    """Refuses feature maps that no operator takes.

    Args:
        features: maps of shape (N, C, H, W), one a level.

    Raises:
        ValueError: there are none, or shapes, dtypes or devices do not fit.
    """
    if len(features) == 0:
        raise ValueError("features is empty; give at least one map of shape (N, C, H, W)")
    first = features[0]
    for level, feature in enumerate(features):
        if feature.dim() != 4:
            raise ValueError(
                "feature maps must have shape (N, C, H, W); "
                f"level {level} has {tuple(feature.shape)}"
            )
        if feature.dtype not in FEATURE_DTYPES:
            raise ValueError(
                f"level {level} has dtype {feature.dtype}; RoI operators take float32, float64, "
                "float16 and bfloat16"
            )
        if feature.dtype != first.dtype or feature.device != first.device:
            raise ValueError(
                f"level {level} is {feature.dtype} on {feature.device}, level 0 is {first.dtype} "
                f"on {first.device}; all levels must agree"
            )
        if feature.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"level {level} holds {feature.shape[0]} images of {feature.shape[1]} channels, "
                f"level 0 {first.shape[0]} of {first.shape[1]}; all levels must agree"
            )


def to_rows(boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """Boxes in the operators' form.

    Args:
        boxes: (R, 5), rows of (image index, x0, y0, x1, y1), or a sequence with (Ri, 4),
            rows of (x0, y0, x1, y1), for each image.
        like: a feature map, for its device.

    Returns:
        fp32 (R, 5). fp64 boxes are rounded; fp16 ones keep the precision they came with.

    Raises:
        BoxShapeError: the last dimension is not 5, or not 4 in a sequence.
        ValueError: boxes and features are on different devices.
    """
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise BoxShapeError(
                "boxes must have shape (R, 5): (image index, x0, y0, x1, y1); got "
                f"{tuple(boxes.shape)}. A list of (Ri, 4) tensors, one an image, will do as well"
            )
        rows = boxes.float()
    else:
        parts = []
        for image, part in enumerate(boxes):
            if part.dim() != 2 or part.shape[1] != 4:
                raise BoxShapeError(
                    f"boxes[{image}] must have shape (Ri, 4): (x0, y0, x1, y1); got "
                    f"{tuple(part.shape)}"
                )
            index = torch.full_like(part[:, :1], image, dtype=torch.float32)
            parts.append(torch.cat([index, part.float()], dim=1))
        rows = torch.cat(parts) if parts else like.new_zeros((0, 5), dtype=torch.float32)
    if rows.device != like.device:
        raise ValueError(f"boxes are on {rows.device}, features on {like.device}; move one")
    return rows


def to_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of the output.

    Raises:
        ValueError: not one or two positive numbers.
    """
    pair = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(pair) == 1:
        pair = pair * 2
    if len(pair) != 2 or pair[0] < 1 or pair[1] < 1:
        raise ValueError(f"output_size must be one or two positive integers, got {output_size}")
    return pair[0], pair[1]


def first_level(spatial_scales: Sequence[float]) -> int:
    """FPN's number of the first map: 2 where it has stride 4.

    Raises:
        ValueError: the scales are not 1/2^k, each half of the one before.
    """
    # 1 / 2^k is exact in floating point, so frexp's mantissa of 0.5 tells it.
    parts = [math.frexp(scale) for scale in spatial_scales]
    first = 1 - parts[0][1]
    for level, (mantissa, exponent) in enumerate(parts):
        if mantissa != 0.5 or 1 - exponent != first + level:
            raise ValueError(
                f"spatial_scales must be 1 / 2^k, each half of the one before, got {spatial_scales}"
            )
    return first


def prefers_channels_last(features: Sequence[Tensor]) -> bool:
    """Whether a map is channels_last beyond doubt: a map of one channel or one cell is both."""
    return any(
        f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous()
        for f in features
    )


def to_autocast_dtype(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps in autocast's dtype where autocast is on, so that pooling neither widens nor mixes."""
    device_type = features[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(features)
    dtype = torch.get_autocast_dtype(device_type)
    return [f if f.dtype == torch.float64 else f.to(dtype) for f in features]
