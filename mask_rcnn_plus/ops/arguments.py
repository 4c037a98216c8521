"""Checks the arguments of RoI functions and converts them to the form that operators accept."""

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Grid(enum.IntEnum):
    """The conversion of a box to a grid of points on a map; ``roi::Grid`` in csrc/roi_math.h."""

    ALIGN = 0
    ALIGN_HALF = 1
    WARP = 2
    POOL = 3


# kMaxLevels, kMaxBins and kMaxSamples in csrc/roi_math.h.
MAX_LEVELS, MAX_BINS, MAX_SAMPLES = 32, 32768, 32768


class BoxShapeError(ValueError, AssertionError):
    """Boxes with a wrong shape; an AssertionError too, since torchvision's functions raise that."""


def check_mode(mode: str) -> None:
    """Raises a ValueError unless ``mode`` is ``"avg"`` or ``"max"``."""
    if mode not in ("avg", "max"):
        raise ValueError(f"mode must be 'avg' or 'max', got {mode!r}")


def to_maps(features: Sequence[Tensor]) -> list[Tensor]:
    """Checks feature maps (N, C, H, W), which autocast does not convert, as in torchvision.

    Raises:
        ValueError: not a list of tensors, or unsupported shapes, dtypes or devices.
    """
    if isinstance(features, Tensor):
        raise ValueError("features is one tensor; give a list of maps, one per level")
    if len(features) == 0:
        raise ValueError("features is empty; give at least one map of shape (N, C, H, W)")
    if len(features) > MAX_LEVELS:
        raise ValueError(f"features must have at most {MAX_LEVELS} levels, got {len(features)}")
    for level, feature in enumerate(features):
        if not isinstance(feature, Tensor):
            raise ValueError(
                f"a feature map must be a tensor; level {level} is {type(feature).__name__}"
            )
    features = list(features)
    first = features[0]
    for level, feature in enumerate(features):
        if feature.dim() != 4:
            raise ValueError(
                "feature maps must have shape (N, C, H, W); "
                f"level {level} has {tuple(feature.shape)}"
            )
        if feature.dtype not in FEATURE_DTYPES:
            raise ValueError(
                f"level {level} has dtype {feature.dtype}; RoI operators support float32, "
                "float64, float16 and bfloat16"
            )
        if feature.dtype != first.dtype or feature.device != first.device:
            raise ValueError(
                f"level {level} is {feature.dtype} on {feature.device}, level 0 is {first.dtype} "
                f"on {first.device}; all levels must agree"
            )
        if feature.shape[:2] != first.shape[:2]:
            raise ValueError(
                f"level {level} has {feature.shape[0]} images of {feature.shape[1]} channels, "
                f"level 0 has {first.shape[0]} of {first.shape[1]}; all levels must agree"
            )
    return features


def to_rows(boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """Boxes as rows (R, 5) of (image index, x0, y0, x1, y1), in fp64 for fp64 maps, else in fp32.

    Args:
        boxes: (R, 5), rows of (image index, x0, y0, x1, y1), or a sequence with (Ri, 4),
            rows of (x0, y0, x1, y1), for each image.
        like: a feature map.

    Raises:
        BoxShapeError: the last dimension is not 5, or not 4 in a sequence.
        ValueError: not tensors of real numbers, or not on the device of the features.
    """
    for part in [boxes] if isinstance(boxes, Tensor) else boxes:
        if not isinstance(part, Tensor) or part.is_complex():
            kind = str(part.dtype) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"boxes must be a tensor (R, 5) of real numbers, or a list of (Ri, 4); got {kind}"
            )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise BoxShapeError(
                "boxes must have shape (R, 5): (image index, x0, y0, x1, y1); got "
                f"{tuple(boxes.shape)}. A list of (Ri, 4) tensors, one per image, also works"
            )
        rows = boxes.to(dtype)
    else:
        parts = []
        for image, part in enumerate(boxes):
            if part.dim() != 2 or part.shape[1] != 4:
                raise BoxShapeError(
                    f"boxes[{image}] must have shape (Ri, 4): (x0, y0, x1, y1); got "
                    f"{tuple(part.shape)}"
                )
            index = torch.full_like(part[:, :1], image, dtype=dtype)
            parts.append(torch.cat([index, part.to(dtype)], dim=1))
        rows = torch.cat(parts) if parts else like.new_zeros((0, 5), dtype=dtype)
    if rows.device != like.device:
        raise ValueError(f"boxes are on {rows.device}, features on {like.device}; move one of them")
    return rows


def to_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of the output.

    Raises:
        ValueError: not one or two positive integers.
    """
    sides = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,)
    if len(sides) == 1:
        sides = sides * 2
    pair = [to_whole(side) for side in sides]
    if len(pair) != 2 or any(side is None or not 1 <= side <= MAX_BINS for side in pair):
        raise ValueError(
            f"output_size must be one or two whole numbers of 1 to {MAX_BINS}, got {output_size!r}"
        )
    return pair[0], pair[1]  # type: ignore[return-value]


def to_whole(value: object) -> int | None:
    """An integer of Python, torch or NumPy as int; None for other values."""
    if isinstance(value, int | torch.SymInt):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    return int(value) if hasattr(value, "__index__") else None  # type: ignore[call-overload]


def check_sampling(sampling_ratio: int, spatial_scales: Sequence[float]) -> None:
    """Raises a ValueError for a ratio that is not an integer or too large, or an invalid scale."""
    # detectron2's pooler accepts 0.0.
    ratio = 0 if sampling_ratio == 0 else to_whole(sampling_ratio)
    if ratio is None or ratio > MAX_SAMPLES:
        raise ValueError(
            f"sampling_ratio must be a whole number of at most {MAX_SAMPLES}, "
            f"got {sampling_ratio!r}"
        )
    for scale in spatial_scales:
        if not 0 < scale < math.inf:
            raise ValueError(f"spatial_scale must be above zero and finite, got {scale}")


def check_canonical(canonical_box_size: float, canonical_level: int) -> None:
    """Raises a ValueError for an invalid size, or a level that is not an integer."""
    is_number = isinstance(canonical_box_size, int | float)
    if not is_number or not 0 < canonical_box_size < math.inf:
        raise ValueError(
            f"canonical_box_size must be above zero and finite, got {canonical_box_size!r}"
        )
    if to_whole(canonical_level) is None:
        raise ValueError(f"canonical_level must be a whole number, got {canonical_level!r}")


def first_level(spatial_scales: Sequence[float]) -> int:
    """FPN's number of the first map: 2 if it has stride 4.

    Raises:
        ValueError: the scales are not 1/2^k, each half of the previous one.
    """
    if len(spatial_scales) == 0:
        raise ValueError("spatial_scales is empty; give one per map")
    # 1 / 2^k is exact in floating point, with a mantissa of 0.5 in frexp.
    parts = [math.frexp(scale) for scale in spatial_scales]
    first = 1 - parts[0][1]
    for level, (mantissa, exponent) in enumerate(parts):
        if mantissa != 0.5 or 1 - exponent != first + level:
            raise ValueError(
                f"spatial_scales must be 1 / 2^k, each half of the previous one, "
                f"got {spatial_scales}"
            )
    return first


def with_cells(feature: Tensor) -> Tensor:
    """The map, or one cell of zeros per image and channel if the map is empty: samples are 0."""
    height, width = feature.shape[2:]
    if height == 0 or width == 0:
        return torch.nn.functional.pad(feature, (0, int(width == 0), 0, int(height == 0)))
    return feature


def prefers_channels_last(features: Sequence[Tensor]) -> bool:
    """Whether a map is channels_last and not contiguous: a map of one channel or cell is both."""
    return any(
        f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous()
        for f in features
    )
