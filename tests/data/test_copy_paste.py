"""Copy-paste, calculated by hand on images of a few pixels."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from mask_rcnn_plus.data.copy_paste import CopyPaste, paste
from mask_rcnn_plus.data.sampling import SampleOrder, Samples
from mask_rcnn_plus.data.seeding import seed_all
from mask_rcnn_plus.errors import UserError


def sample(
    size: tuple[int, int],
    value: int,
    boxes: list[tuple[int, int, int, int]],
    points: list[list[float]] | None = None,
) -> dict[str, Any]:
    """An image of one grey level, with objects that fill their boxes (x0, y0, x1, y1)."""
    objects = Instances(size)
    objects.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    objects.gt_classes = torch.arange(len(boxes)) + value
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    objects.gt_masks = BitMasks(masks)
    if points is not None:
        objects.gt_keypoints = Keypoints(torch.tensor(points, dtype=torch.float32)[:, None])
    image = torch.full((3, *size), value, dtype=torch.uint8)
    return {"image": image, "instances": objects, "height": 1, "file_name": "a.png"}


def test_masks_below_lose_the_covered_pixels() -> None:
    # Not covered; half covered; completely covered.
    below = sample((8, 10), 10, [(0, 0, 2, 2), (2, 3, 6, 7), (5, 4, 7, 6)])
    above = sample((8, 10), 20, [(4, 3, 8, 7), (0, 6, 2, 8)])
    before = below["image"].clone(), below["instances"].gt_masks.tensor.clone()
    result = paste(below, above, torch.tensor([0]), (0, 0))
    objects = result["instances"]
    # The second loses x 4 to 6, the third everything. The other object above is not chosen.
    assert objects.gt_classes.tolist() == [10, 11, 20]
    assert objects.gt_boxes.tensor.tolist() == [[0, 0, 2, 2], [2, 3, 4, 7], [4, 3, 8, 7]]
    assert objects.gt_masks.tensor.flatten(1).sum(1).tolist() == [4, 8, 16]
    image = torch.full((8, 10), 10)
    image[3:7, 4:8] = 20
    assert torch.equal(result["image"].long(), image.expand(3, 8, 10))
    assert result["height"] == 1
    # No pixel belongs to two objects, and the given samples do not change.
    assert objects.gt_masks.tensor.sum(0).max() == 1
    assert torch.equal(below["image"], before[0])
    assert torch.equal(below["instances"].gt_masks.tensor, before[1])


def test_an_object_pasted_over_the_middle_makes_a_hole() -> None:
    below = sample((9, 9), 10, [(1, 1, 8, 8)])
    result = paste(below, sample((9, 9), 20, [(3, 3, 5, 5)]), torch.tensor([0]), (0, 0))
    assert result["instances"].gt_boxes.tensor.tolist() == [[1, 1, 8, 8], [3, 3, 5, 5]]
    assert result["instances"].gt_masks.tensor.flatten(1).sum(1).tolist() == [45, 4]


def test_annotated_boxes_of_whole_objects_stay() -> None:
    below = sample((9, 9), 10, [(1, 1, 3, 3)])
    above = sample((5, 5), 20, [(1, 1, 3, 3)])
    below["instances"].gt_boxes.tensor[0] += torch.tensor([-0.4, -0.4, 0.4, 0.4])
    above["instances"].gt_boxes.tensor[0] += torch.tensor([-0.2, 0.0, 0.2, 3.5])
    objects = paste(below, above, torch.tensor([0]), (4, 4))["instances"]
    expected = [[0.6, 0.6, 3.4, 3.4], [4.8, 5.0, 7.2, 9.0]]  # clipped to the image
    assert objects.gt_boxes.tensor.numpy() == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("place", "box"),
    [
        ((2, 3), [[3, 2, 6, 6]]),  # moved by (x 3, y 2)
        ((-2, -1), [[0, 0, 2, 2]]),  # cut on the left and above
        ((6, 8), [[8, 6, 10, 8]]),  # cut on the right and below
        ((-4, 0), []),  # outside
    ],
)
def test_an_object_across_the_border_is_cut(place: tuple[int, int], box: list[list[float]]) -> None:
    above = sample((5, 6), 20, [(0, 0, 3, 4)])
    result = paste(sample((8, 10), 10, []), above, torch.tensor([0]), place)
    assert result["instances"].gt_boxes.tensor.tolist() == box
    image = torch.full((8, 10), 10)
    for x0, y0, x1, y1 in box:
        image[y0:y1, x0:x1] = 20
    assert torch.equal(result["image"][1].long(), image)
    assert result["instances"].image_size == (8, 10)


def test_keypoints_move_and_may_be_covered_or_outside() -> None:
    points = [[1, 1, 2], [5.5, 5.5, 2], [4.5, 5.5, 0]]
    below = sample((8, 8), 10, [(0, 0, 2, 2), (3, 3, 7, 7), (3, 3, 6, 7)], points)
    above = sample((8, 8), 20, [(3, 3, 6, 6), (0, 0, 3, 3)], [[3.5, 3.5, 1], [1, 1, 2]])
    objects = paste(below, above, torch.tensor([0, 1]), (2, 2))["instances"]
    # 5, 5 to 8, 8 and 2, 2 to 5, 5 are pasted: the second's point is covered (COCO's 1).
    assert objects.gt_keypoints.tensor[:, 0].tolist() == [
        [1, 1, 2],
        [5.5, 5.5, 1],
        [4.5, 5.5, 0],
        [5.5, 5.5, 1],
        [3, 3, 2],
    ]
    objects = paste(below, above, torch.tensor([1]), (-2, 0))["instances"]
    assert objects.gt_keypoints.tensor[-1, 0].tolist() == [0, 0, 0]


def test_without_objects_nothing_is_pasted_and_polygons_are_refused() -> None:
    below, pasting = sample((8, 8), 10, [(0, 0, 2, 2)]), CopyPaste(probability=1, max_objects=3)
    assert pasting(below, sample((8, 8), 20, [])) is below
    # A sample of another mapper that has lost all objects has no gt_masks.
    bare = sample((8, 8), 10, [])
    bare["instances"].remove("gt_masks")
    assert len(pasting(bare, below)["instances"]) == 1
    polygons = sample((8, 8), 10, [(0, 0, 2, 2)])
    polygons["instances"].gt_masks = PolygonMasks([[np.array([0.0, 0, 2, 0, 2, 2])]])
    with pytest.raises(UserError, match=r"INPUT\.MASK_FORMAT bitmask"):
        pasting(polygons, below)


def test_number_choice_and_place_are_drawn() -> None:
    boxes = [(x, y, x + 1, y + 1) for x in range(4) for y in range(4)]
    pasting = CopyPaste(probability=1, max_objects=5)
    counts, classes, corners = set(), set(), set()
    for draw in range(200):
        seed_all(draw)
        objects = pasting(sample((8, 9), 10, []), sample((4, 4), 20, boxes))["instances"]
        counts.add(len(objects))
        classes |= set(objects.gt_classes.tolist())
        for (x0, y0, *_), number in zip(
            objects.gt_boxes.tensor.tolist(), objects.gt_classes.tolist(), strict=True
        ):
            x, y, *_ = boxes[number - 20]
            corners.add((y0 - y, x0 - x))
    assert counts == {1, 2, 3, 4, 5} and classes == set(range(20, 36))
    assert corners == {(y, x) for y in range(5) for x in range(6)}
    # A larger image covers the whole sample.
    for draw in range(20):
        seed_all(draw)
        result = pasting(sample((4, 4), 10, []), sample((9, 8), 20, [(0, 0, 8, 9)]))
        assert (result["image"] == 20).all()


def test_a_sample_depends_only_on_its_position_and_half_get_objects() -> None:
    records = [{"file_name": f"{number}.png", "number": number} for number in range(8)]

    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        return sample((6, 6), 10 * record["number"], [(0, 0, 2, 2), (2, 2, 4, 4)])

    def take(probability: float, position: int) -> tuple[list[int], int]:
        samples = Samples(
            records,
            mapper,
            SampleOrder(8, seed=3),
            copy_paste=CopyPaste(probability=probability, max_objects=2),
        )
        made, refused = samples[position, 1]
        assert refused == []
        return made["instances"].gt_classes.tolist(), int(made["image"].sum())

    whole = [take(0.5, position) for position in range(200)]
    seed_all("another history")
    assert [take(0.5, position) for position in range(199, -1, -1)] == whole[::-1]
    pasted = sum(classes != [10, 11] for classes, _ in whole)
    assert 75 < pasted < 125
    # Objects come from every image, including the sample's own.
    others = {number // 10 for classes, _ in whole for number in classes}
    assert others == set(range(8))
    assert all(take(0.0, position)[0] == [10, 11] for position in range(20))


def test_an_unusable_source_image_is_named_and_replaced() -> None:
    records = [{"file_name": f"{number}.png", "number": number} for number in range(3)]

    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        if record["number"] == 2:
            raise UserError("image '2.png' cannot be used")
        return sample((6, 6), record["number"], [(0, 0, 2, 2)])

    pasting = CopyPaste(probability=1, max_objects=1)
    samples = Samples(records, mapper, SampleOrder(3, seed=0), max_bad=1, copy_paste=pasting)
    notes = [samples[position, 0][1] for position in range(30)]
    reason = ("2.png", "image '2.png' cannot be used")
    assert {note for found in notes for note in found} == {reason}
    assert any(not found for found in notes)
    strict = Samples(records, mapper, SampleOrder(3, seed=0), copy_paste=pasting)
    with pytest.raises(UserError, match=r"2\.png"):
        [strict[position, 0] for position in range(30)]
