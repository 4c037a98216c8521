"""Slow RoI operators, written directly from their definitions, in fp64.

Every sample is visited on its own; nothing is merged, separated, or shared with the package.
"""

import math

import torch
from torch import Tensor


def sample(channels: Tensor, y: float, x: float) -> Tensor:
    """Bilinear value of maps (C, H, W) at a point whose integer coordinates are cell centres."""
    height, width = channels.shape[-2:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return channels.new_zeros(channels.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = min(int(y), max(height - 2, 0)), min(int(x), max(width - 2, 0))
    value = channels.new_zeros(channels.shape[0])
    for row in (top, top + 1):
        for column in (left, left + 1):
            weight = (1 - abs(y - row)) * (1 - abs(x - column))
            if weight > 0:
                value = value + weight * channels[:, row, column]
    return value


def roi_align(
    maps: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    scale: float = 1.0,
    ratio: int = -1,
    aligned: bool = False,
    mode: str = "avg",
) -> Tensor:
    """maps (N, C, H, W) fp64 and boxes (R, 5) to (R, C, height, width)."""
    offset = 0.5 if aligned else 0.0
    rows = []
    for image, *corners in boxes.double().tolist():
        x0, y0, x1, y1 = (v * scale - offset for v in corners)
        height, width = y1 - y0, x1 - x0
        if not aligned:
            height, width = max(height, 1.0), max(width, 1.0)
        bin_h, bin_w = height / output_size[0], width / output_size[1]
        grid_h = ratio if ratio > 0 else max(math.ceil(bin_h), 0)
        grid_w = ratio if ratio > 0 else max(math.ceil(bin_w), 0)
        channels = maps[int(image)]
        for i in range(output_size[0]):
            for j in range(output_size[1]):
                values = []
                for a in range(grid_h):
                    for b in range(grid_w):
                        y = y0 + (i + (a + 0.5) / grid_h) * bin_h
                        x = x0 + (j + (b + 0.5) / grid_w) * bin_w
                        values.append(sample(channels, y, x))
                if not values:
                    rows.append(channels.new_zeros(channels.shape[0]))
                elif mode == "avg":
                    rows.append(sum(values) / len(values))
                else:
                    rows.append(torch.stack(values).max(dim=0).values)
    shape = (len(boxes), *output_size, maps.shape[1])
    flat = torch.stack(rows) if rows else maps.new_zeros((0, maps.shape[1]))
    return flat.reshape(shape).permute(0, 3, 1, 2)


def nearest_cell(v: float) -> int:
    """Rounds halves away from zero."""
    return math.floor(abs(v) + 0.5) * (1 if v >= 0 else -1)


def roi_warp(
    maps: Tensor,
    boxes: Tensor,
    output_size: tuple[int, int],
    scale: float = 1.0,
    ratio: int = -1,
    mode: str = "avg",
) -> Tensor:
    """maps (N, C, H, W) fp64 and boxes (R, 5) to (R, C, height, width)."""
    rows = []
    for image, *corners in boxes.double().tolist():
        x0, y0, x1, y1 = (nearest_cell(v * scale) for v in corners)
        rows.append([image, x0, y0, max(x1, x0) + 1, max(y1, y0) + 1])
    cells = torch.tensor(rows, dtype=torch.float64)
    return roi_align(maps, cells, output_size, 1.0, ratio, True, mode)


def roi_pool(
    maps: Tensor, boxes: Tensor, output_size: tuple[int, int], scale: float = 1.0
) -> Tensor:
    """maps (N, C, H, W) fp64 and boxes (R, 5) to (R, C, height, width)."""
    out = maps.new_zeros((len(boxes), maps.shape[1], *output_size))
    for r, (image, *corners) in enumerate(boxes.double().tolist()):
        x0, y0, x1, y1 = (nearest_cell(v * scale) for v in corners)
        sides = max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1)
        for i in range(output_size[0]):
            for j in range(output_size[1]):
                spans = []
                for start, side, bins, bin_, size in (
                    (y0, sides[0], output_size[0], i, maps.shape[2]),
                    (x0, sides[1], output_size[1], j, maps.shape[3]),
                ):
                    begin, end = bin_ * side // bins, -(-(bin_ + 1) * side // bins)
                    spans.append([min(max(start + v, 0), size) for v in (begin, end)])
                (top, bottom), (left, right) = spans
                if top < bottom and left < right:
                    cells = maps[int(image), :, top:bottom, left:right].flatten(1)
                    out[r, :, i, j] = cells.max(dim=1).values
    return out


def fpn_level(box: list[float], levels: range, size: float = 224, canonical: int = 4) -> int:
    """The level number (not index) of a box (x0, y0, x1, y1), FPN equation 1."""
    side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    level = math.floor(canonical + math.log2(side / size + 1e-8))
    return min(max(level, levels[0]), levels[-1])
