"""Large pictures tile by tile, so that small objects are as large as the network knows them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.structures import Boxes, Instances

from mask_rcnn_plus.errors import UserError
from mask_rcnn_plus.evaluation.coco_json import encoded_masks
from mask_rcnn_plus.modeling import RunLengthMasks
from mask_rcnn_plus.ops.run_lengths import Window
from mask_rcnn_plus.prediction.images import BGR, to_bgr
from mask_rcnn_plus.prediction.merging import Piece, join

_SMALLEST = 32  # pixels, of a tile
_MOST_OVERLAP = 0.9


class SlicedPredictor:
    """Predicts on overlapping tiles of a picture, and joins what their borders cut.

    A tile goes through the predictor as a picture of its own, resized to INPUT.MIN_SIZE_TEST like
    any other: tiles smaller than that enlarge what is in them. Objects larger than a tile may
    stay in parts, so take tiles larger than the largest. Memory grows with the picture and the
    number of objects, not with their product. How tiles are joined: see ``merging.join``.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[BGR]], list[Instances]],
        *,
        tile: int = 1024,
        overlap: float = 0.2,
        array_format: str = "BGR",
        tiles_at_a_time: int = 16,
    ) -> None:
        """
        Args:
            predict: from pictures to their objects, one Instances a picture, such as a
                BatchPredictor with ``paste=False``.
            tile: the side of a tile in pixels, at least 32.
            overlap: the part of its side that a tile shares with the next, from 0 to 0.9. It
                should hold a small object whole. With 0 nothing is joined.
            array_format: the order of colours in arrays that are given.
            tiles_at_a_time: how many tiles ``predict`` gets at once.

        Raises:
            UserError: tile or overlap are out of range.
        """
        if tile < _SMALLEST:
            raise UserError(f"a slice of {tile} pixels is too small: at least {_SMALLEST}")
        if not 0 <= overlap <= _MOST_OVERLAP:
            raise UserError(f"an overlap of {overlap} is none: give 0 to {_MOST_OVERLAP}")
        self._predict = predict
        self._tile = tile
        self._overlap = overlap
        self._array_format = array_format
        self._at_a_time = tiles_at_a_time

    def __call__(self, images: Iterable[Any]) -> list[Instances]:
        """Detects the objects of each picture.

        Args:
            images: as BatchPredictor takes them.

        Returns:
            one Instances a picture, in its pixels and on the CPU, best scores first:
            ``pred_boxes``, ``scores``, ``pred_classes``, and ``pred_masks`` (RunLengthMasks) where
            the model has masks. Without masks the boxes are joined.

        Raises:
            UserError: one of them is no picture, or the model predicts keypoints.
        """
        return [
            self._of_one(to_bgr(image, array_format=self._array_format, named=f"image {number}"))
            for number, image in enumerate(images)
        ]

    def _of_one(self, picture: BGR) -> Instances:
        height, width = picture.shape[:2]
        tiles = tiles_of((height, width), self._tile, self._overlap)
        pieces: list[Piece] = []
        masks = False
        for start in range(0, len(tiles), self._at_a_time):
            part = tiles[start : start + self._at_a_time]
            # Copies: a tile on the way through must not keep the whole picture's strides.
            crops = [np.ascontiguousarray(picture[y0:y1, x0:x1]) for x0, y0, x1, y1 in part]
            for number, found in enumerate(self._predict(crops), start):
                if found.has("pred_keypoints"):
                    raise UserError("keypoints cannot be joined across tiles: predict unsliced")
                masks = masks or found.has("pred_masks")
                pieces += _pieces(found.to("cpu"), number, tiles[number], (height, width))
        return _instances(join(pieces), (height, width), masks)


def tiles_of(size: tuple[int, int], side: int, overlap: float) -> list[Window]:
    """Equally large tiles that cover an image, row by row.

    Args:
        size: (H, W) of the image.
        side: of a tile; one that the image is smaller than is the image's.
        overlap: the part of a tile that it shares with the next, at least; the last of a row or
            column shares more.

    Returns:
        (x0, y0, x1, y1) of each, inside the image.
    """
    step = max(1, int(side * (1 - overlap)))
    spans = []
    for length in size:
        last = max(0, length - side)
        starts = [*range(0, last, step), last]
        spans.append([(start, min(length, start + side)) for start in starts])
    return [(x0, y0, x1, y1) for (y0, y1), (x0, x1) in itertools.product(*spans)]


def _pieces(found: Instances, number: int, frame: Window, size: tuple[int, int]) -> list[Piece]:
    boxes = found.pred_boxes.tensor.double().numpy()
    if found.has("pred_masks"):
        rles = encoded_masks(found.pred_masks)
    else:
        rles = [_rectangle(box, found.image_size) for box in boxes]
    boxes = boxes + np.array([*frame[:2], *frame[:2]], np.float64)
    rows = zip(rles, boxes, found.scores.tolist(), found.pred_classes.tolist(), strict=True)
    return [Piece(number, frame, *row, size) for row in rows]


def _rectangle(box: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """A box as a mask, at least a pixel large."""
    x0, y0 = np.floor(box[:2]).astype(int)
    x1, y1 = np.maximum(np.ceil(box[2:]).astype(int), (x0 + 1, y0 + 1))
    filled = np.zeros(size, np.uint8, order="F")
    filled[max(0, y0) : y1, max(0, x0) : x1] = 1
    return mask_util.encode(filled)


def _instances(objects: Sequence[Any], size: tuple[int, int], masks: bool) -> Instances:
    result = Instances(size)
    boxes = np.array([found.box for found in objects], np.float32).reshape(-1, 4)
    result.pred_boxes = Boxes(torch.from_numpy(boxes))
    result.scores = torch.tensor([found.score for found in objects], dtype=torch.float32)
    result.pred_classes = torch.tensor([found.label for found in objects], dtype=torch.int64)
    if masks:
        result.pred_masks = RunLengthMasks([found.rle for found in objects], size)
    return result
