"""Tiles and how they are joined, with a stub in the place of a model that sees what is there."""

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from mask_rcnn_plus import SlicedPredictor, UserError
from mask_rcnn_plus.prediction.slicing import tiles_of


class Stub:
    """Finds each connected patch of one colour: its class is the colour, its score its share."""

    def __init__(self, *, masks: bool = True) -> None:
        self.masks = masks
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, pictures: Sequence[np.ndarray]) -> list[Instances]:
        return [self._find(picture) for picture in pictures]

    def _find(self, picture: np.ndarray) -> Instances:
        self.shapes.append(picture.shape)
        found = []
        for color in range(1, int(picture.max()) + 1):
            count, patches = cv2.connectedComponents((picture[:, :, 0] == color).astype(np.uint8))
            found += [(color - 1, patches == number) for number in range(1, count)]
        result = Instances(picture.shape[:2])
        boxes = []
        for _, mask in found:
            rows, columns = np.nonzero(mask)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        result.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        result.scores = torch.tensor([mask.mean() for _, mask in found], dtype=torch.float32)
        result.pred_classes = torch.tensor([color for color, _ in found], dtype=torch.int64)
        if self.masks:
            shape = (len(found), *picture.shape[:2])
            masks = np.array([mask for _, mask in found], bool).reshape(shape)
            result.pred_masks = torch.from_numpy(masks)
        return result


def scene(*patches: tuple[int, int, int, int, int], size: tuple[int, int] = (200, 300)):
    """A black picture with rectangles (x0, y0, x1, y1, colour)."""
    picture = np.zeros((*size, 3), np.uint8)
    for x0, y0, x1, y1, color in patches:
        picture[y0:y1, x0:x1] = color
    return picture


def predict(picture: np.ndarray, stub: Stub | None = None, **options: object) -> Instances:
    options = {"tile": 100, "overlap": 0.2, **options}
    return SlicedPredictor(stub or Stub(), **options)([picture])[0]


def as_set(found: Instances) -> set[tuple]:
    """Class, box and mask of each object, in no order."""
    return {
        (int(label), tuple(box.tolist()), mask.numpy().tobytes())
        for label, box, mask in zip(
            found.pred_classes, found.pred_boxes.tensor, found.pred_masks, strict=True
        )
    }


@pytest.mark.parametrize(
    "patches",
    [
        # Tiles of 100 begin at 0, 80, 160 and 200.
        [(10, 10, 40, 40, 1)],
        [(70, 20, 130, 60, 1)],  # in two tiles, cut by both
        [(85, 20, 95, 40, 1)],  # wholly in the part that two tiles share
        [(60, 60, 120, 130, 1), (20, 150, 40, 199, 2)],  # over a corner where four tiles meet
        [(5, 90, 295, 110, 1)],  # through all tiles of a row, and two rows
        [(70, 20, 95, 60, 1), (95, 20, 130, 60, 2)],  # neighbours of two classes
        [(75, 20, 92, 60, 1), (94, 20, 130, 60, 1)],  # neighbours of one
        [(50, 10, 180, 20, 1), (50, 30, 180, 40, 1), (50, 10, 60, 40, 1)],  # two arms cut
    ],
)
def test_objects_at_borders_are_exact(patches: list[tuple[int, int, int, int, int]]) -> None:
    picture = scene(*patches)
    whole = Stub()([picture])[0]
    joined = predict(picture)
    assert len(joined) == len(whole)
    assert as_set(joined) == as_set(whole)


def test_a_part_of_an_object_joins_the_whole_of_another_tile() -> None:
    class Hasty(Stub):
        """Sees only the upper half of what a tile's left border cuts."""

        def _find(self, picture: np.ndarray) -> Instances:
            found = super()._find(picture)
            for i, box in enumerate(found.pred_boxes.tensor):
                if box[0] == 0:
                    half = int(box[1] + box[3]) // 2
                    found.pred_masks[i, half:] = False
                    box[3] = half
            return found

    picture = scene((70, 20, 95, 60, 1))  # whole in the first tile, cut by the second's border
    assert as_set(predict(picture, Hasty())) == as_set(Stub()([picture])[0])


def test_two_objects_that_one_tile_tells_apart_stay_two() -> None:
    class Blurred(Stub):
        """Takes what is near in the second tile for one object."""

        def _find(self, picture: np.ndarray) -> Instances:
            if len(self.shapes) == 1:
                picture = scene((1, 20, 17, 60, 1), size=(100, 100))
            return super()._find(picture)

    picture = scene((81, 20, 89, 60, 1), (91, 20, 97, 60, 1), size=(100, 180))
    assert as_set(predict(picture, Blurred())) == as_set(Stub()([picture])[0])


def test_small_images_are_one_tile_and_tiles_are_equally_large() -> None:
    stub = Stub()
    predict(scene((3, 3, 9, 9, 1), size=(60, 90)), stub)
    assert stub.shapes == [(60, 90, 3)]
    for size in ((200, 300), (100, 100), (101, 999), (40, 333)):
        tiles = tiles_of(size, 100, 0.2)
        seen = np.zeros(size, int)
        for x0, y0, x1, y1 in tiles:
            assert (x1 - x0, y1 - y0) == (min(100, size[1]), min(100, size[0]))
            seen[y0:y1, x0:x1] += 1
        assert seen.min() == 1 and len(set(tiles)) == len(tiles)
        starts = sorted({x0 for x0, *_ in tiles})
        assert all(b - a <= 80 for a, b in itertools.pairwise(starts))


def test_without_masks_boxes_are_joined() -> None:
    picture = scene((70, 20, 130, 60, 1), (10, 150, 30, 170, 2))
    found = predict(picture, Stub(masks=False))
    assert not found.has("pred_masks")
    assert sorted(found.pred_boxes.tensor.tolist()) == [[10, 150, 30, 170], [70, 20, 130, 60]]


def test_nothing_found_and_best_scores_first() -> None:
    nothing = predict(scene())
    assert len(nothing) == 0 and nothing.pred_masks.to_tensor().shape == (0, 200, 300)
    scores = predict(scene((5, 5, 10, 10, 1), (40, 5, 70, 30, 1), (20, 70, 40, 79, 2))).scores
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and len(scores) == 3
    many = SlicedPredictor(Stub(), tile=100)([scene(), scene((5, 5, 10, 10, 1))])
    assert [len(found) for found in many] == [0, 1]


@pytest.mark.parametrize(
    ("options", "words"), [({"tile": 31}, "at least 32"), ({"overlap": 0.95}, "overlap of 0.95")]
)
def test_refusals(options: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        SlicedPredictor(Stub(), **options)
