"""The sizes of the boxes, and how well anchors fit them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FIT = 0.5  # an anchor fits a box from this IoU on


@dataclass(frozen=True)
class AnchorSettings:
    """The settings that decide how well anchors fit the boxes.

    Attributes:
        sizes: sides of the square anchors, in pixels of the resized image.
        ratios: height / width.
        min_size, max_size: shorter side of the resized image, and the limit of its longer side; 0
            for no resizing.
    """

    sizes: Sequence[float]
    ratios: Sequence[float]
    min_size: int
    max_size: int


def box_lines(
    shapes: Sequence[tuple[float, float, int, int]], anchors: AnchorSettings | None
) -> list[str]:
    """Describes the sizes of boxes.

    Args:
        shapes: (width, height of a box, width, height of its image) in pixels.
        anchors: the training config's anchors, if there is a config.
    """
    if not shapes:
        return []
    values = np.array(shapes, np.float64)
    side = np.sqrt(values[:, 0] * values[:, 1])
    low, middle, high = np.percentile(side, [5, 50, 95])
    small, large = (side < 32).mean(), (side >= 96).mean()
    lines = [
        f"boxes: side {low:.0f} / {middle:.0f} / {high:.0f} px (5 %, median, 95 %); COCO sizes: "
        f"{small:.0%} small, {1 - small - large:.0%} medium, {large:.0%} large"
    ]
    if anchors is not None:
        best = anchor_fit(shapes, anchors)
        poor = float((best < _FIT).mean())
        line = f"anchors: best IoU with a box {np.median(best):.2f} (median), "
        line += f"below {_FIT} for {poor:.0%} of the boxes"
        if poor > 0.1:
            few, many = np.percentile(side * _scales(values, anchors), [5, 95])
            line += (
                f"; after resizing, boxes are {few:.0f} to {many:.0f} px large, "
                f"MODEL.ANCHOR_GENERATOR.SIZES are {min(anchors.sizes):g} to {max(anchors.sizes):g}"
            )
        lines.append(line)
    return lines


def anchor_fit(
    shapes: Sequence[tuple[float, float, int, int]], anchors: AnchorSettings
) -> np.ndarray:
    """The best IoU of each box with an anchor that has the same centre.

    Args:
        shapes: B boxes, as in ``box_lines``.
        anchors: the anchors' settings.

    Returns:
        (B,), from 0 to 1.
    """
    values = np.array(shapes, np.float64)
    boxes = values[:, :2] * _scales(values, anchors)[:, None]
    sizes = np.repeat(np.array(anchors.sizes, np.float64), len(anchors.ratios))
    root = np.sqrt(np.tile(np.array(anchors.ratios, np.float64), len(anchors.sizes)))
    widths, heights = sizes / root, sizes * root
    common = np.minimum(boxes[:, :1], widths) * np.minimum(boxes[:, 1:], heights)
    union = boxes.prod(1)[:, None] + widths * heights - common
    return (common / union).max(1)


def _scales(values: np.ndarray, anchors: AnchorSettings) -> np.ndarray:
    """The factor by which each image is resized."""
    if not anchors.min_size:
        return np.ones(len(values))
    short, long = values[:, 2:].min(1), values[:, 2:].max(1)
    return np.minimum(anchors.min_size / short, (anchors.max_size or np.inf) / long)
