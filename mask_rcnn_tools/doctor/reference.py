"""The operators written from their definitions in fp64, for the self-test to compare with.

Bilinear sampling is a weight for each cell in a row times one for each in a column, so that a box's
samples are one product of matrices. Nothing is shared with ``ops``; derivatives are autograd's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAPS = {"align": 0.0, "align_half": 0.5, "warp": 0.5}  # how far a grid shifts boxes, in cells


def pool(
    features: Sequence[Tensor],
    boxes: Sequence[tuple[float, ...]],
    bins: int,
    scales: Sequence[float],
    ratio: int,
    grid: str,
    mode: str,
) -> Tensor:
    """Any of the RoI operators.

    Args:
        features: maps (1, C, Hl, Wl), fp64.
        boxes: R of (x0, y0, x1, y1) in input-image pixels.
        bins: of the output, in each axis.
        scales: 1 / stride of each map.
        ratio: samples a bin and axis; 0 adapts to the box.
        grid: "align", "align_half", "warp" or "pool".
        mode: "avg" or "max".

    Returns:
        (R, C, bins, bins).
    """
    results = []
    for box in boxes:
        level = _level(box, scales)
        cells, corners = features[level][0], [value * scales[level] for value in box]
        if grid in ("warp", "pool"):
            corners = [float(math.floor(value + 0.5)) for value in corners]
            corners[2:] = [max(v, w) + 1 for v, w in zip(corners[2:], corners[:2], strict=True)]
        if grid == "pool":
            results.append(_cells(cells, corners, bins))
            continue
        if grid != "warp":
            corners = [value - MAPS[grid] for value in corners]
        else:
            corners = [value - 0.5 for value in corners]
        weights, samples = [], []
        for start, end, size in zip(corners[1::-1], corners[:1:-1], cells.shape[1:], strict=True):
            length = end - start if grid != "align" else max(end - start, 1.0)
            count = ratio or math.ceil(length / bins)
            points = start + (torch.arange(bins * count).double() + 0.5) * length / (bins * count)
            weights.append(_weights(points, size))
            samples.append(count)
        values = torch.einsum("ih,chw,jw->cij", weights[0], cells, weights[1])
        values = values.unflatten(2, (bins, -1)).unflatten(1, (bins, -1))
        results.append(values.mean((2, 4)) if mode == "avg" else values.amax((2, 4)))
    return torch.stack(results)


def paste(mask: Tensor, box: tuple[float, ...], height: int, width: int) -> Tensor:
    """The pixels (height, width) whose centre's bilinear sample of a mask (M, M) reaches 0.5."""
    sides = []
    for start, end, pixels, cells in (
        (box[1], box[3], height, mask.shape[0]),
        (box[0], box[2], width, mask.shape[1]),
    ):
        points = (torch.arange(pixels).double() + 0.5 - start) / (end - start) * cells - 0.5
        sides.append((1 - (points[:, None] - torch.arange(cells)).abs()).clamp(min=0))
    return sides[0] @ mask.double() @ sides[1].T >= 0.5


def _level(box: tuple[float, ...], scales: Sequence[float]) -> int:
    """FPN, equation 1."""
    if len(scales) == 1:
        return 0
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = math.floor(4 + math.log2(side / 224 + 1e-8)) + round(math.log2(scales[0]))
    return min(max(level, 0), len(scales) - 1)


def _weights(points: Tensor, cells: int) -> Tensor:
    """Of each cell at each point; none further than a cell outside."""
    inside = (points >= -1) & (points <= cells)
    held = points.clamp(0, cells - 1)
    weights = (1 - (held[:, None] - torch.arange(cells)).abs()).clamp(min=0)
    return weights * inside[:, None]


def _cells(cells: Tensor, corners: Sequence[float], bins: int) -> Tensor:
    """RoIPool: the greatest of the cells of each bin, 0 for none."""
    spans = []
    for start, end, size in zip(corners[1::-1], corners[:1:-1], cells.shape[1:], strict=True):
        length = end - start
        first = [start + math.floor(number * length / bins) for number in range(bins)]
        last = [start + math.ceil((number + 1) * length / bins) for number in range(bins)]
        spans.append(
            [
                slice(*(int(min(max(v, 0), size)) for v in pair))
                for pair in zip(first, last, strict=True)
            ]
        )
    zero = cells.new_zeros(len(cells))
    rows = []
    for row in spans[0]:
        parts = [cells[:, row, column] for column in spans[1]]
        rows.append(torch.stack([p.amax((1, 2)) if p[0].numel() else zero for p in parts], 1))
    return torch.stack(rows, 1)
