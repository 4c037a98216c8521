"""Detections of overlapping tiles joined into the objects of the whole image, by their masks.

Where two tiles overlap, both see the same pixels, so one object has the same mask there in both. A
suppression by boxes over the whole image (SAHI, Akyon et al. 2022, section 3) would keep one of two
halves; here they are joined.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util

from mask_rcnn_plus.ops.run_lengths import Window, crop, placed, window_of

# Intersection over union, in what two tiles share, from which on two masks are one object.
_SAME = 0.5
# Intersection over the smaller one, where a tile's border cuts one of the two: what is left of an
# object at a border is often found in part.
_PART = 0.7
# A mask so near to a border that is none of the image's, as a part of the tile's side, is cut.
_NEAR = 0.01


@dataclass(frozen=True)
class Piece:
    """A detection in a tile.

    Attributes:
        tile: the tile's number.
        frame: the tile, in pixels of the image.
        rle: the mask, in COCO's run-length encoding, of the size of the tile.
        box: (4,), (x0, y0, x1, y1) in pixels of the image.
        score: from 0 to 1.
        label: the class, from 0.
        size: (H, W) of the image.
    """

    tile: int
    frame: Window
    rle: dict[str, Any]
    box: npt.NDArray[np.float64]
    score: float
    label: int
    size: tuple[int, int]

    @cached_property
    def window(self) -> Window:
        """The smallest window of the image around the mask."""
        x0, y0, x1, y1 = window_of(self.rle)
        x, y = self.frame[:2]
        return x0 + x, y0 + y, x1 + x, y1 + y

    @cached_property
    def cut(self) -> bool:
        """Whether the object may go on beyond the tile."""
        (x0, y0, x1, y1), (left, top, right, bottom) = self.window, self.frame
        near_x = max(2, round(_NEAR * (right - left)))
        near_y = max(2, round(_NEAR * (bottom - top)))
        height, width = self.size
        return (
            (left > 0 and x0 - left < near_x)
            or (top > 0 and y0 - top < near_y)
            or (right < width and right - x1 < near_x)
            or (bottom < height and bottom - y1 < near_y)
        )

    def crop(self, window: Window) -> npt.NDArray[np.uint8]:
        """The mask in a window of the image that lies inside the tile."""
        x, y = self.frame[:2]
        return crop(self.rle, (window[0] - x, window[1] - y, window[2] - x, window[3] - y))

    def in_image(self) -> dict[str, Any]:
        """The mask at the size of the image."""
        return placed(self.rle, self.frame[:2], self.size)


@dataclass(frozen=True)
class Joined:
    """An object of the image; the fields are :class:`Piece`'s."""

    rle: dict[str, Any]
    box: npt.NDArray[np.float64]
    score: float
    label: int


def join(pieces: Sequence[Piece]) -> list[Joined]:
    """The objects that the detections of all tiles of an image show, best scores first.

    Two detections of one class, from different tiles, are one object where their masks have an
    intersection over union of at least 0.5 in what the tiles share; or, where a border cuts one of
    them, an intersection over the smaller one of at least 0.7. The most alike are joined first; a
    join that would make one object of two that one tile has seen apart is left, unless its border
    cuts both. Of an object that some tile shows whole, the whole detection with the best score
    stands; of one that every tile cuts, masks and boxes are united. The score is the best.
    """
    # Empty masks have no place.
    pieces = [piece for piece in pieces if piece.window[2] > piece.window[0]]
    matches = sorted(_matches(pieces), key=lambda match: -match[0])
    clusters = {number: [number] for number in range(len(pieces))}
    for _, a, b in matches:
        one, other = clusters[a], clusters[b]
        if one is other or not _may_join(pieces, one, other):
            continue
        one += other
        for number in other:
            clusters[number] = one
    distinct = {id(cluster): cluster for cluster in clusters.values()}.values()
    objects = [_combined([pieces[i] for i in cluster]) for cluster in distinct]
    return sorted(objects, key=lambda found: -found.score)


def _matches(pieces: Sequence[Piece]) -> list[tuple[float, int, int]]:
    """(likeness, number, number) of the pairs that are one object."""
    by_tile: dict[int, list[int]] = defaultdict(list)
    for number, piece in enumerate(pieces):
        by_tile[piece.tile].append(number)
    result = []
    for first, second in itertools.combinations(by_tile.values(), 2):
        shared = _intersection(pieces[first[0]].frame, pieces[second[0]].frame)
        if shared is None:
            continue
        left, right = (
            {i: part for i in numbers if (part := _intersection(pieces[i].window, shared))}
            for numbers in (first, second)
        )
        for i, j in itertools.product(left, right):
            if pieces[i].label != pieces[j].label:
                continue
            common = _intersection(left[i], right[j])
            if common is None:
                continue
            likeness = _likeness(pieces[i], pieces[j], left[i], right[j], common)
            if likeness > 0:
                result.append((likeness, i, j))
    return result


def _likeness(a: Piece, b: Piece, part_a: Window, part_b: Window, common: Window) -> float:
    """Above 0 where two detections are one object: the more, the surer."""
    both = int((a.crop(common) & b.crop(common)).sum())
    if both == 0:
        return 0.0
    of_a, of_b = int(a.crop(part_a).sum()), int(b.crop(part_b).sum())
    union = both / (of_a + of_b - both)
    if union >= _SAME:
        return 1 + union
    part = both / min(of_a, of_b)
    return part if part >= _PART and (a.cut or b.cut) else 0.0


def _may_join(pieces: Sequence[Piece], one: Sequence[int], other: Sequence[int]) -> bool:
    return all(
        pieces[i].cut and pieces[j].cut
        for i, j in itertools.product(one, other)
        if pieces[i].tile == pieces[j].tile
    )


def _combined(cluster: Sequence[Piece]) -> Joined:
    score = max(piece.score for piece in cluster)
    whole = [piece for piece in cluster if not piece.cut]
    chosen = [max(whole, key=lambda piece: piece.score)] if whole else cluster
    boxes = np.stack([piece.box for piece in chosen])
    rle = chosen[0].in_image()
    if len(chosen) > 1:
        rle = mask_util.merge([piece.in_image() for piece in chosen])
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    return Joined(rle, box, score, chosen[0].label)


def _intersection(a: Window, b: Window) -> Window | None:
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
