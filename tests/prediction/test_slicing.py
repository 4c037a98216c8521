"""Tiles and how they are merged, with a stub model that detects patches of one colour."""

import itertools
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from mask_rcnn_plus import SlicedPredictor, UserError
from mask_rcnn_plus.prediction.slicing import tile_windows


class Stub:
    """Detects each connected patch of one colour. Class: the colour; score: the patch's share."""

    def __init__(self, *, masks: bool = True) -> None:
        self.masks = masks
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, images: Sequence[np.ndarray]) -> list[Instances]:
        return [self._find(image) for image in images]

    def _find(self, image: np.ndarray) -> Instances:
        self.shapes.append(image.shape)
        detections = []
        for color in range(1, int(image.max()) + 1):
            count, patches = cv2.connectedComponents((image[:, :, 0] == color).astype(np.uint8))
            detections += [(color - 1, patches == number) for number in range(1, count)]
        result = Instances(image.shape[:2])
        boxes = []
        for _, mask in detections:
            rows, columns = np.nonzero(mask)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.scores = torch.tensor([mask.mean() for _, mask in detections], dtype=torch.float32)
        result.pred_classes = torch.tensor([color for color, _ in detections], dtype=torch.int64)
        if self.masks:
            shape = (len(detections), *image.shape[:2])
            masks = np.array([mask for _, mask in detections], bool).reshape(shape)
            result.pred_masks = torch.from_numpy(masks)
        return result


def scene(*patches: tuple[int, int, int, int, int], size: tuple[int, int] = (200, 300)):
    """A black image with rectangles (x0, y0, x1, y1, colour)."""
    image = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1, color in patches:
        image[y0:y1, x0:x1] = color
    return image


def predict(image: np.ndarray, stub: Stub | None = None, **options: object) -> Instances:
    options = {"tile": 100, "overlap": 0.2, **options}
    return SlicedPredictor(stub or Stub(), **options)([image])[0]


def as_set(detections: Instances) -> set[tuple]:
    """The set of (class, box, mask)."""
    return {
        (int(label), tuple(box.tolist()), mask.numpy().tobytes())
        for label, box, mask in zip(
            detections.pred_classes,
            detections.pred_boxes.tensor,
            detections.pred_masks,
            strict=True,
        )
    }


@pytest.mark.parametrize(
    "patches",
    [
        # Tiles of side 100 start at 0, 80, 160 and 200.
        [(10, 10, 40, 40, 1)],
        [(70, 20, 130, 60, 1)],  # in two tiles, cut by both
        [(85, 20, 95, 40, 1)],  # inside the area that two tiles share
        [(60, 60, 120, 130, 1), (20, 150, 40, 199, 2)],  # over a corner where four tiles meet
        [(5, 90, 295, 110, 1)],  # through all tiles of a row, and two rows
        [(70, 20, 95, 60, 1), (95, 20, 130, 60, 2)],  # neighbours, two classes
        [(75, 20, 92, 60, 1), (94, 20, 130, 60, 1)],  # neighbours, one class
        [(50, 10, 180, 20, 1), (50, 30, 180, 40, 1), (50, 10, 60, 40, 1)],  # two arms cut
    ],
)
def test_objects_at_borders_are_merged_exactly(
    patches: list[tuple[int, int, int, int, int]],
) -> None:
    image = scene(*patches)
    whole = Stub()([image])[0]
    merged = predict(image)
    assert len(merged) == len(whole)
    assert as_set(merged) == as_set(whole)


def test_a_part_of_an_object_merges_with_the_whole_in_another_tile() -> None:
    class UpperHalf(Stub):
        """Detects only the upper half of an object that a tile's left border cuts."""

        def _find(self, image: np.ndarray) -> Instances:
            detections = super()._find(image)
            for i, box in enumerate(detections.pred_boxes.tensor):
                if box[0] == 0:
                    half = int(box[1] + box[3]) // 2
                    detections.pred_masks[i, half:] = False
                    box[3] = half
            return detections

    image = scene((70, 20, 95, 60, 1))  # whole in the first tile, cut in the second
    assert as_set(predict(image, UpperHalf())) == as_set(Stub()([image])[0])


def test_objects_that_one_tile_separates_are_not_merged() -> None:
    class Blurred(Stub):
        """Detects two close objects as one in the second tile."""

        def _find(self, image: np.ndarray) -> Instances:
            if len(self.shapes) == 1:
                image = scene((1, 20, 17, 60, 1), size=(100, 100))
            return super()._find(image)

    image = scene((81, 20, 89, 60, 1), (91, 20, 97, 60, 1), size=(100, 180))
    assert as_set(predict(image, Blurred())) == as_set(Stub()([image])[0])


def test_tiles_cover_the_image_and_have_one_size() -> None:
    stub = Stub()
    predict(scene((3, 3, 9, 9, 1), size=(60, 90)), stub)
    assert stub.shapes == [(60, 90, 3)]
    for size in ((200, 300), (100, 100), (101, 999), (40, 333)):
        tiles = tile_windows(size, 100, 0.2)
        seen = np.zeros(size, int)
        for x0, y0, x1, y1 in tiles:
            assert (x1 - x0, y1 - y0) == (min(100, size[1]), min(100, size[0]))
            seen[y0:y1, x0:x1] += 1
        assert seen.min() == 1 and len(set(tiles)) == len(tiles)
        starts = sorted({x0 for x0, *_ in tiles})
        assert all(b - a <= 80 for a, b in itertools.pairwise(starts))


def test_without_masks_boxes_are_merged() -> None:
    image = scene((70, 20, 130, 60, 1), (10, 150, 30, 170, 2))
    detections = predict(image, Stub(masks=False))
    assert not detections.has("pred_masks")
    assert sorted(detections.pred_boxes.tensor.tolist()) == [[10, 150, 30, 170], [70, 20, 130, 60]]


def test_no_detections_and_order_by_score() -> None:
    nothing = predict(scene())
    assert len(nothing) == 0 and nothing.pred_masks.to_tensor().shape == (0, 200, 300)
    scores = predict(scene((5, 5, 10, 10, 1), (40, 5, 70, 30, 1), (20, 70, 40, 79, 2))).scores
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len(scores) == 3
    many = SlicedPredictor(Stub(), tile=100)([scene(), scene((5, 5, 10, 10, 1))])
    assert [len(detections) for detections in many] == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 31}, "at least 32 pixels, got 31"),
        ({"overlap": 0.95}, "overlap must be between 0 and 0.9, got 0.95"),
        ({"array_format": "rgb"}, "array_format is 'rgb'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SlicedPredictor(Stub(), **options)
