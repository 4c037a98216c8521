"""Outlines of a mask along pixel edges: polygons that pycocotools turns back into the same mask."""

import cv2
import numpy as np

# Steps along pixel edges as (dx, dy), clockwise on screen: right, down, left, up.
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """The outlines of a mask as COCO polygons.

    COCO forms the union of an object's polygons and does not support holes, so a vertical line
    through a hole cuts the region in two. The polygons do not overlap. Rasterised by pycocotools,
    their union is exactly the mask.

    Args:
        mask: (H, W) bool, True on the object.

    Returns:
        one list [x0, y0, x1, y1, ...] per part, clockwise on screen, with vertices at pixel corners
        in image coordinates (the first pixel spans 0 to 1); empty for an empty mask. The values are
        integers of type float, because detectron2's transforms truncate integer coordinates.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return []
    top, left = int(rows.min()), int(columns.min())
    polygons: list[list[float]] = []
    pending = _regions(mask[top : rows.max() + 1, left : columns.max() + 1])
    while pending:
        region = pending.pop()
        # The outer loop has the leftmost vertex; all other loops are holes.
        outer, *holes = sorted(_trace(region), key=_leftmost)
        if holes:
            cut = _leftmost(holes[0])
            for side in (slice(None, cut), slice(cut, None)):
                half = np.zeros_like(region)
                half[:, side] = region[:, side]
                pending.extend(_regions(half))
        else:
            polygons.append([float(value) for x, y in outer for value in (x + left, y + top)])
    return polygons


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Splits a mask into its 4-connected parts."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return [labels == label for label in range(1, count)]


def _leftmost(loop: list[tuple[int, int]]) -> int:
    return min(x for x, _ in loop)


def _trace(region: np.ndarray) -> list[list[tuple[int, int]]]:
    """The vertices of the closed loops around a 4-connected region, which is on their right."""
    padded = np.pad(region, 1)
    inside = padded[1:-1, 1:-1]
    # (no neighbour above, right, below, left; start of that edge relative to the pixel)
    edges = (
        (inside & ~padded[:-2, 1:-1], 0, 0),
        (inside & ~padded[1:-1, 2:], 1, 0),
        (inside & ~padded[2:, 1:-1], 1, 1),
        (inside & ~padded[1:-1, :-2], 0, 1),
    )
    leaving: dict[tuple[int, int], set[int]] = {}
    for direction, (edge, dx, dy) in enumerate(edges):
        rows, columns = np.nonzero(edge)
        for x, y in zip((columns + dx).tolist(), (rows + dy).tolist(), strict=True):
            leaving.setdefault((x, y), set()).add(direction)

    loops = []
    while leaving:
        # Where two pixels touch only at a corner, two edges leave: do not start there.
        x, y = next(vertex for vertex, ways in leaving.items() if len(ways) == 1)
        direction = next(iter(leaving[x, y]))
        before = -1
        loop: list[tuple[int, int]] = []
        while (x, y) in leaving:
            # There, turning right stays with the same pixel, so the region stays 4-connected.
            ways = leaving[x, y]
            direction = next(way for turn in (1, 0, 3) if (way := (direction + turn) % 4) in ways)
            ways.remove(direction)
            if not ways:
                del leaving[x, y]
            if direction != before:
                loop.append((x, y))
            before = direction
            dx, dy = _STEPS[direction]
            x, y = x + dx, y + dy
        loops.append(loop)
    return loops
