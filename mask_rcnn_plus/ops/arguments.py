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

# roi_math.h: kMaxLevels, kMaxBins, kMaxSamples.
MOST_LEVELS, MOST_BINS, MOST_SAMPLES = 32, 32768, 32768


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


def check_maps(features: Sequence[Tensor]) -> None:
    """Refuses what is no list of tensors.

    Raises:
        ValueError: it is not.
    """
    if isinstance(features, Tensor):
        raise ValueError("features is one tensor; give a list of maps, one a level")
    if len(features) == 0:
        raise ValueError("features is empty; give at least one map of shape (N, C, H, W)")
    for level, feature in enumerate(features):
        if not isinstance(feature, Tensor):
            raise ValueError(
                f"a feature map must be a tensor; level {level} is {type(feature).__name__}"
            )


def check_features(features: Sequence[Tensor]) -> None:
    """Refuses feature maps that no operator takes.

    Args:
        features: at least one map of shape (N, C, H, W), one a level.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    if len(features) > MOST_LEVELS:
        raise ValueError(f"got {len(features)} feature maps; at most {MOST_LEVELS} levels will do")
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
        ValueError: no tensors of real numbers; boxes and features are on different devices.
    """
    for part in [boxes] if isinstance(boxes, Tensor) else boxes:
        if not isinstance(part, Tensor) or part.is_complex():
            kind = str(part.dtype) if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"boxes must be a tensor (R, 5) of real numbers, or a list of (Ri, 4); got {kind}"
            )
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
    sides = tuple(output_size) if isinstance(output_size, tuple | list) else (output_size,)
    if len(sides) == 1:
        sides = sides * 2
    pair = [to_whole(side) for side in sides]
    if len(pair) != 2 or any(side is None or not 1 <= side <= MOST_BINS for side in pair):
        raise ValueError(
            f"output_size must be one or two whole numbers of 1 to {MOST_BINS}, got {output_size!r}"
        )
    return pair[0], pair[1]  # type: ignore[return-value]


def to_whole(value: object) -> int | None:
    """The integer that a value is, of Python's, torch's or NumPy's; None if it is none."""
    if isinstance(value, int | torch.SymInt):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    return int(value) if hasattr(value, "__index__") else None  # type: ignore[call-overload]


def check_sampling(sampling_ratio: int, spatial_scales: Sequence[float]) -> None:
    """Refuses what no grid can be made of.

    Raises:
        ValueError: a ratio that is no whole number, or too large; a scale that is not above zero
            and finite.
    """
    ratio = to_whole(sampling_ratio)
    if ratio is None or ratio > MOST_SAMPLES:
        raise ValueError(
            f"sampling_ratio must be a whole number of at most {MOST_SAMPLES}, "
            f"got {sampling_ratio!r}"
        )
    for scale in spatial_scales:
        if not 0 < scale < math.inf:
            raise ValueError(f"spatial_scale must be above zero and finite, got {scale}")


def check_canonical(canonical_box_size: float, canonical_level: int) -> None:
    """Refuses what FPN's equation 1 cannot assign levels by.

    Raises:
        ValueError: a size that is not above zero and finite, or a level that is no whole number.
    """
    known = isinstance(canonical_box_size, int | float)
    if not known or not 0 < canonical_box_size < math.inf:
        raise ValueError(
            f"canonical_box_size must be above zero and finite, got {canonical_box_size!r}"
        )
    if to_whole(canonical_level) is None:
        raise ValueError(f"canonical_level must be a whole number, got {canonical_level!r}")


def first_level(spatial_scales: Sequence[float]) -> int:
    """FPN's number of the first map: 2 where it has stride 4.

    Raises:
        ValueError: the scales are not 1/2^k, each half of the one before.
    """
    if len(spatial_scales) == 0:
        raise ValueError("spatial_scales is empty; give one a map")
    # 1 / 2^k is exact in floating point, so frexp's mantissa of 0.5 tells it.
    parts = [math.frexp(scale) for scale in spatial_scales]
    first = 1 - parts[0][1]
    for level, (mantissa, exponent) in enumerate(parts):
        if mantissa != 0.5 or 1 - exponent != first + level:
            raise ValueError(
                f"spatial_scales must be 1 / 2^k, each half of the one before, got {spatial_scales}"
            )
    return first


def with_cells(feature: Tensor) -> Tensor:
    """A map that has a cell: one without gets zeros, which is what samples of it are worth."""
    height, width = feature.shape[2:]
    if height == 0 or width == 0:
        return torch.nn.functional.pad(feature, (0, int(width == 0), 0, int(height == 0)))
    return feature


def prefers_channels_last(features: Sequence[Tensor]) -> bool:
    """Whether a map is channels_last beyond doubt: a map of one channel or one cell is both."""
    return any(
        f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous()
        for f in features
    )


def to_autocast_dtype(features: Sequence[Tensor]) -> list[Tensor]:
    """Maps in autocast's dtype where autocast is on, so that pooling neither widens nor mixes."""
    device_type = features[0].device.type
    # Autocast knows no meta device.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return list(features)
    dtype = torch.get_autocast_dtype(device_type)
    return [f if f.dtype == torch.float64 else f.to(dtype) for f in features]
