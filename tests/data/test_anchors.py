"""Boxes at training size, and anchors that cover them."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, BoxMode, pairwise_iou

from mask_rcnn_plus.config import get_cfg
from mask_rcnn_plus.data import build_train_mapper
from mask_rcnn_plus.data.anchors import (
    Anchors,
    SeenBoxes,
    best_ious,
    coverage,
    fit,
    seen_boxes,
)
from mask_rcnn_plus.data.augmentation import build_augmentations
from mask_rcnn_plus.data.seeding import seed_all


def record(boxes: list[list[float]], size: tuple[int, int] = (40, 60)) -> dict[str, Any]:
    objects = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes]
    crowd = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 1}
    return {"height": size[0], "width": size[1], "annotations": [*objects, crowd]}


def test_boxes_are_resized_and_crowds_removed() -> None:
    records = [record([[3, 4, 13, 24]]), record([], size=(10, 10))]
    seen = seen_boxes(records, [T.ResizeShortestEdge(80, 1000)], seed=0, draws=2)
    assert seen.boxes.tolist() == [[6, 8, 26, 48]] * 2
    assert seen.sizes.tolist() == [[80, 120]] * 2


def test_boxes_are_where_the_mapper_puts_them(tmp_path: Any) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((40, 60, 3), np.uint8))
    cfg = get_cfg()
    cfg.INPUT.CROP.SIZE = [0.5, 0.7]
    boxes = [[0.0, 0.0, 20.0, 20.0], [10.0, 5.0, 50.0, 30.0], [55.0, 30.0, 60.0, 40.0]]
    one = {**record(boxes), "file_name": str(tmp_path / "a.png")}
    sizes = set()
    for jitter in (False, True):
        cfg.INPUT.JITTER.ENABLED, cfg.INPUT.CROP.ENABLED = jitter, not jitter
        cfg.INPUT.JITTER.SIZE = (32, 48)
        seen = seen_boxes([one], build_augmentations(cfg), seed=3, draws=9)
        found = []
        for draw in range(9):
            seed_all(3, "boxes", 0, draw)
            sample = build_train_mapper(cfg)(one)
            found += sample["instances"].gt_boxes.tensor.tolist()
            sizes.add(tuple(sample["image"].shape[1:]))
        assert seen.boxes == pytest.approx(np.array(found), abs=1e-3)
        assert {(int(h), int(w)) for h, w in seen.sizes} <= sizes
    assert (32, 48) in sizes and len(sizes) > 3


def test_an_iou_worked_out_by_hand() -> None:
    seen = SeenBoxes(np.array([[0.0, 0, 16, 16]]), np.array([[32.0, 32]]))
    anchors = Anchors(sizes=((16.0,),), ratios=((1.0,),), strides=(16,))
    # The anchor around (0, 0) or (16, 16) covers a quarter of the box: 64 of 256 + 256 - 64.
    assert best_ious(seen, anchors).tolist() == [pytest.approx(1 / 7)]
    # Half a stride further, the anchor equals the box.
    middle = Anchors(sizes=((16.0,),), ratios=((1.0,),), strides=(16,), offset=0.5)
    assert coverage(seen, middle).mean == 1
    # Twice as high as wide, 22.6 x 11.3: their intersection is 16 x 16 at most.
    tall = Anchors(sizes=((16.0,),), ratios=((2.0,),), strides=(16,), offset=0.5)
    common = 16 * 16 / 2**0.5
    assert best_ious(seen, tall).tolist() == [pytest.approx(common / (512 - common))]


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_best_ious_equal_those_of_all_anchors_of_detectron2(offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    height, width = 75, 110
    corners = torch.rand(60, 2, generator=generator) * torch.tensor([width, height])
    extents = 2 + 50 * torch.rand(60, 2, generator=generator) ** 2
    boxes = Boxes(torch.cat([corners, corners + extents], 1))
    boxes.clip((height, width))
    boxes = boxes[boxes.nonempty(1)]
    sizes, ratios, strides = (
        [[8.0, 11.0], [20.0, 40.0]],
        [[0.5, 1.0, 2.0], [0.7, 1.1, 3.0]],
        [8, 16],
    )
    maps = [torch.zeros(1, 1, -(-height // s), -(-width // s)) for s in strides]
    every = DefaultAnchorGenerator(
        sizes=sizes, aspect_ratios=ratios, strides=strides, offset=offset
    )(maps)
    expected = pairwise_iou(boxes, Boxes.cat(every)).max(1).values
    seen = SeenBoxes(boxes.tensor.double().numpy(), np.tile([[height, width]], (len(boxes), 1)))
    anchors = Anchors(
        tuple(map(tuple, sizes)), tuple(map(tuple, ratios)), tuple(strides), offset=offset
    )
    assert best_ious(seen, anchors) == pytest.approx(expected.numpy(), abs=1e-5)


def test_anchors_are_fitted_to_sizes_and_ratios() -> None:
    draw = np.random.default_rng(0)
    # Twice as high as wide: 20 x 40 and 60 x 120, plus or minus 5 %.
    width = np.repeat([20.0, 60.0], 50) * draw.uniform(0.95, 1.05, 100)
    corners = draw.uniform(0, 300, (100, 2))
    boxes = np.concatenate([corners, corners + np.stack([width, 2 * width], 1)], 1)
    seen = SeenBoxes(boxes, np.full((100, 2), 512.0))
    start = Anchors(sizes=((200.0,), (400.0,)), ratios=((1.0,), (1.0,)), strides=(4, 8))
    before = coverage(seen, start)
    fitted = fit(seen, start)
    after = coverage(seen, fitted)
    assert before.recall_50 == before.recall_70 == 0
    assert after.recall_50 == after.recall_70 == 1
    (small,), (large,) = fitted.sizes
    assert small == pytest.approx(20 * 2**0.5, rel=0.05)
    assert large == pytest.approx(60 * 2**0.5, rel=0.05)
    assert fitted.ratios[0] == fitted.ratios[1] == (pytest.approx(2, rel=0.05),)
    assert fitted == fitted.rounded()


def test_sizes_do_not_decrease_from_map_to_map() -> None:
    # Each box fits only one map: small boxes are centred on cells of the coarse map, large ones
    # between them, on cells of the fine map. Without the constraint, sizes would be [[24], [8]].
    small = np.array([[16.0 * i - 4, -4 + 16 * 3, 16 * i + 4, 4 + 16 * 3] for i in range(1, 6)])
    large = np.array([[16.0 * i - 8, 36, 16 * i + 16, 60] for i in range(1, 6)])
    seen = SeenBoxes(np.concatenate([small, large]), np.full((10, 2), 128.0))
    start = Anchors(sizes=((23.0,), (9.0,)), ratios=((1.0,), (1.0,)), strides=(4, 16))
    fitted = fit(seen, start)
    assert fitted != start
    (fine,), (coarse,) = fitted.sizes
    assert fine <= coarse
    before, after = coverage(seen, start), coverage(seen, fitted)
    assert after.recall_50 >= before.recall_50 and after.recall_70 >= before.recall_70
    three = Anchors(((30.0, 9.0), (8.0, 25.0)), ((1.0,), (1.0,)), (4, 16))
    flat = [size for level in fit(seen, three).sizes for size in level]
    assert flat == sorted(flat)


def test_perfect_anchors_are_kept() -> None:
    seen = SeenBoxes(np.array([[8.0, 8, 24, 24]]), np.array([[32.0, 32]]))
    start = Anchors(sizes=((16.0,),), ratios=((1.0,),), strides=(16,))
    assert coverage(seen, start).mean == 1 and fit(seen, start) == start
