"""Prediction on overlapping tiles of large images, so that small objects are large enough.

Where two tiles overlap, both show the same pixels, so an object has the same mask there in both:
detections whose masks agree there are merged. Non-maximum suppression of boxes over the whole image
(SAHI, Akyon et al. 2022, section 3) would keep only one half of an object that a border cuts.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

from mask_rcnn_plus.data.pixels import BGR, check_array_format
from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import encoded_masks
from mask_rcnn_plus.modeling import RunLengthMasks
from mask_rcnn_plus.ops.run_lengths import Window, crop, placed, window_of
from mask_rcnn_plus.prediction.predictor import no_objects, read_all

_MIN_TILE = 32  # pixels
_MAX_OVERLAP = 0.9
# Two masks are one object from this intersection over union in the area that two tiles share, ...
_SAME_IOU = 0.5
# ... or, if a tile's border cuts one of them, from this intersection over the smaller mask: models
# often find only a part of an object at a border.
_PART_OVERLAP = 0.7
# A mask is cut if it is this close to an inner border, as a fraction of the tile's side.
_CUT_DISTANCE = 0.01


class SlicedPredictor:
    """Predicts on overlapping tiles of an image, and merges objects that tile borders cut.

    Each tile is an image for the predictor, which resizes it to INPUT.MIN_SIZE_TEST: in smaller
    tiles, objects become larger. An object larger than a tile may stay in parts, so choose tiles
    larger than the largest object. Memory grows with the image and the number of objects, not with
    their product. :func:`merge` describes how detections are merged.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[BGR]], list[Instances]],
        *,
        tile: int = 1024,
        overlap: float = 0.2,
        array_format: str = "BGR",
        sixteen_bit: str | None = None,
        tiles_at_a_time: int = 16,
    ) -> None:
        """
        Args:
            predict: from images to one Instances per image, such as a BatchPredictor with
                ``paste=False``.
            tile: side of a tile in pixels, at least 32.
            overlap: part of its side that a tile shares with the next one, from 0 to 0.9. The
                shared area should be able to contain a small object. With 0, nothing is merged.
            array_format: channel order of input arrays, "BGR" or "RGB".
            sixteen_bit: as INPUT.SIXTEEN_BIT, for the whole image; None is that of ``predict``.
            tiles_at_a_time: number of tiles that ``predict`` gets in one call.

        Raises:
            UserError: tile or overlap are out of range, or the channel order is unknown.
        """
        if tile < _MIN_TILE:
            raise UserError(f"tiles (--slice) must have at least {_MIN_TILE} pixels, got {tile}")
        if not 0 <= overlap <= _MAX_OVERLAP:
            raise UserError(f"overlap must be between 0 and {_MAX_OVERLAP}, got {overlap}")
        check_array_format(array_format)
        self._predict = predict
        self._tile = tile
        self._overlap = overlap
        self._array_format = array_format
        self._sixteen_bit = sixteen_bit or getattr(predict, "sixteen_bit", "image")
        self._tiles_at_a_time = tiles_at_a_time

    def __call__(
        self,
        images: Iterable[Any],
        *,
        on_error: Callable[[int, UserError], None] | None = None,
    ) -> list[Instances]:
        """Detects the objects in each image.

        Args:
            images: paths, PIL images or arrays, as for BatchPredictor.
            on_error: as for BatchPredictor.

        Returns:
            one Instances per image, in its pixels, on the CPU, best scores first: ``pred_boxes``,
            ``scores``, ``pred_classes``, and ``pred_masks`` (RunLengthMasks) if the model predicts
            masks. Without masks, boxes are merged.

        Raises:
            UserError: an item is not an image and ``on_error`` is None, or the model predicts
                keypoints.

        @public
        """
        return [
            no_objects() if pixels is None else self._predict_one(pixels)
            for pixels in read_all(images, self._array_format, self._sixteen_bit, on_error)
        ]

    def _predict_one(self, image: BGR) -> Instances:
        height, width = image.shape[:2]
        tiles = tile_windows((height, width), self._tile, self._overlap)
        detections: list[TileDetection] = []
        has_masks = False
        for start in range(0, len(tiles), self._tiles_at_a_time):
            windows = tiles[start : start + self._tiles_at_a_time]
            # Contiguous copies, as the predictor gets for whole images.
            crops = [np.ascontiguousarray(image[y0:y1, x0:x1]) for x0, y0, x1, y1 in windows]
            for window, instances in zip(windows, self._predict(crops), strict=True):
                if instances.has("pred_keypoints"):
                    raise UserError("keypoints cannot be merged across tiles: predict without them")
                has_masks = has_masks or instances.has("pred_masks")
                detections += _detections(instances.to("cpu"), window, (height, width))
        return _to_instances(merge(detections), (height, width), has_masks)


def tile_windows(size: tuple[int, int], side: int, overlap: float) -> list[Window]:
    """Tiles of equal size that cover an image, row by row.

    Args:
        size: (H, W) of the image.
        side: the side of a tile. If the image is smaller, the tile has the image's side.
        overlap: smallest part of its side that a tile shares with the next one. The last tile of a
            row or column shares more.

    Returns:
        (x0, y0, x1, y1) of each tile, inside the image.
    """
    step = max(1, int(side * (1 - overlap)))
    spans = []
    for length in size:
        last = max(0, length - side)
        starts = [*range(0, last, step), last]
        spans.append([(start, min(length, start + side)) for start in starts])
    return [(x0, y0, x1, y1) for (y0, y1), (x0, x1) in itertools.product(*spans)]


def _detections(instances: Instances, tile: Window, size: tuple[int, int]) -> list["TileDetection"]:
    boxes = instances.pred_boxes.tensor.double().numpy()
    if instances.has("pred_masks"):
        rles = encoded_masks(instances.pred_masks)
    else:
        rles = [_box_mask(box, instances.image_size) for box in boxes]
    boxes = boxes + np.array([*tile[:2], *tile[:2]], np.float64)
    scores, labels = instances.scores.tolist(), instances.pred_classes.tolist()
    rows = zip(rles, boxes, scores, labels, strict=True)
    return [TileDetection(tile, *row, size) for row in rows]


def _box_mask(box: npt.NDArray[np.float64], size: tuple[int, int]) -> dict[str, Any]:
    """A box as a mask of at least one pixel."""
    x0, y0 = np.floor(box[:2]).astype(int)
    x1, y1 = np.maximum(np.ceil(box[2:]).astype(int), (x0 + 1, y0 + 1))
    mask = np.zeros(size, np.uint8, order="F")
    mask[max(0, y0) : y1, max(0, x0) : x1] = 1
    return mask_util.encode(mask)


def _to_instances(
    objects: Sequence["MergedObject"], size: tuple[int, int], has_masks: bool
) -> Instances:
    result = Instances(size)
    boxes = np.array([o.box for o in objects], np.float32).reshape(-1, 4)
    result.pred_boxes = Boxes(torch.from_numpy(boxes))
    result.scores = torch.tensor([o.score for o in objects], dtype=torch.float32)
    result.pred_classes = torch.tensor([o.label for o in objects], dtype=torch.int64)
    if has_masks:
        result.pred_masks = RunLengthMasks([o.rle for o in objects], size)
    return result


@dataclass(frozen=True)
class TileDetection:
    """A detection in a tile.

    Attributes:
        tile: in pixels of the image.
        rle: the mask, in COCO's run-length encoding, of the size of the tile.
        box: (4,), (x0, y0, x1, y1) in pixels of the image.
        score: from 0 to 1.
        label: class id, from 0.
        size: (H, W) of the image.
    """

    tile: Window
    rle: dict[str, Any]
    box: npt.NDArray[np.float64]
    score: float
    label: int
    size: tuple[int, int]

    @cached_property
    def window(self) -> Window:
        """The smallest window of the image that contains the mask."""
        return _shift(window_of(self.rle), *self.tile[:2])

    @cached_property
    def is_cut(self) -> bool:
        """Whether the object may continue beyond the tile."""
        (x0, y0, x1, y1), (left, top, right, bottom) = self.window, self.tile
        near_x, near_y = (max(2, round(_CUT_DISTANCE * s)) for s in (right - left, bottom - top))
        height, width = self.size
        return (
            (left > 0 and x0 - left < near_x)
            or (top > 0 and y0 - top < near_y)
            or (right < width and right - x1 < near_x)
            or (bottom < height and bottom - y1 < near_y)
        )

    def crop(self, window: Window) -> npt.NDArray[np.uint8]:
        """The mask in a window of the image, inside the tile."""
        x, y = self.tile[:2]
        return crop(self.rle, _shift(window, -x, -y))


class MergedObject(NamedTuple):
    """An object of the image. As :class:`TileDetection`, but the mask has the image's size."""

    rle: dict[str, Any]
    box: npt.NDArray[np.float64]
    score: float
    label: int


def merge(detections: Sequence[TileDetection]) -> list[MergedObject]:
    """Merges the detections of all tiles of an image into objects, best scores first.

    Two detections of one class in different tiles are the same object if their masks have an
    intersection over union of at least 0.5 in the area that the tiles share; or, if a border cuts
    one of them, an intersection over the smaller one of at least 0.7. The most similar pairs are
    merged first. A merge must not combine two detections of one tile, unless its border cuts both.

    If a tile shows the whole object, the result is the best of such detections. Otherwise it is the
    union of masks and boxes. Its score is the best score of all its detections.
    """
    detections = [d for d in detections if d.window[2] > d.window[0]]  # no empty masks
    pairs = sorted(_similar_pairs(detections), key=lambda pair: -pair[0])
    clusters = {i: [i] for i in range(len(detections))}
    for _, i, j in pairs:
        first, second = clusters[i], clusters[j]
        if first is not second and _may_merge(detections, first, second):
            first += second
            clusters.update(dict.fromkeys(second, first))
    distinct = {id(cluster): cluster for cluster in clusters.values()}.values()
    objects = [_combine([detections[i] for i in cluster]) for cluster in distinct]
    return sorted(objects, key=lambda merged: -merged.score)


def _similar_pairs(detections: Sequence[TileDetection]) -> list[tuple[float, int, int]]:
    """(similarity, index, index) of detections that show the same object."""
    by_tile: dict[Window, list[int]] = defaultdict(list)
    for i, detection in enumerate(detections):
        by_tile[detection.tile].append(i)
    pairs = []
    for tiles in itertools.combinations(by_tile, 2):
        shared = _intersect(*tiles)
        if shared is None:
            continue
        first_parts, second_parts = (
            {i: part for i in by_tile[tile] if (part := _intersect(detections[i].window, shared))}
            for tile in tiles
        )
        for i, j in itertools.product(first_parts, second_parts):
            if detections[i].label != detections[j].label:
                continue
            similarity = _similarity(detections[i], detections[j], first_parts[i], second_parts[j])
            if similarity > 0:
                pairs.append((similarity, i, j))
    return pairs


def _similarity(a: TileDetection, b: TileDetection, part_a: Window, part_b: Window) -> float:
    """Above 0 if two detections are one object, and higher for more similar masks.

    ``part_a`` and ``part_b`` are their windows in the area that their tiles share.
    """
    common = _intersect(part_a, part_b)
    if common is None:
        return 0.0
    intersection = int((a.crop(common) & b.crop(common)).sum())
    if intersection == 0:
        return 0.0
    area_a, area_b = int(a.crop(part_a).sum()), int(b.crop(part_b).sum())
    iou = intersection / (area_a + area_b - intersection)
    if iou >= _SAME_IOU:
        return 1 + iou
    overlap = intersection / min(area_a, area_b)
    return overlap if overlap >= _PART_OVERLAP and (a.is_cut or b.is_cut) else 0.0


def _may_merge(
    detections: Sequence[TileDetection], first: Sequence[int], second: Sequence[int]
) -> bool:
    return all(
        detections[i].is_cut and detections[j].is_cut
        for i, j in itertools.product(first, second)
        if detections[i].tile == detections[j].tile
    )


def _combine(cluster: Sequence[TileDetection]) -> MergedObject:
    score = max(detection.score for detection in cluster)
    whole = [detection for detection in cluster if not detection.is_cut]
    parts = [max(whole, key=lambda detection: detection.score)] if whole else cluster
    masks = [placed(part.rle, part.tile[:2], part.size) for part in parts]
    boxes = np.stack([part.box for part in parts])
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    rle = masks[0] if len(masks) == 1 else mask_util.merge(masks)
    return MergedObject(rle, box, score, parts[0].label)


def _shift(window: Window, x: int, y: int) -> Window:
    return window[0] + x, window[1] + y, window[2] + x, window[3] + y


def _intersect(a: Window, b: Window) -> Window | None:
    x0, y0, x1, y1 = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
