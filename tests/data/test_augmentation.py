"""Augmentations of the config: the places of pixels, boxes, masks and keypoints."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode

from mask_rcnn_plus.config import get_cfg
from mask_rcnn_plus.data import build_train_mapper
from mask_rcnn_plus.data.augmentation import (
    InRGB,
    PadTo,
    RandomBlur,
    ScaleJitter,
    build_augmentations,
)
from mask_rcnn_plus.data.seeding import seed_all

HEIGHT, WIDTH = 40, 60


def config(**given: Any) -> Any:
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    for key, value in given.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture
def record(tmp_path: Path) -> dict[str, Any]:
    """A white rectangle, x 20 to 50, y 10 to 30, on black, and a crowd over the whole image."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[10:30, 20:50] = 255
    cv2.imwrite(str(tmp_path / "rectangle.png"), image)
    corners = [20.0, 10.0, 50.0, 10.0, 50.0, 30.0, 20.0, 30.0]
    common = {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    full = mask_util.encode(np.asfortranarray(np.ones((HEIGHT, WIDTH), np.uint8)))
    return {
        "file_name": str(tmp_path / "rectangle.png"),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {
                **common,
                "bbox": [20, 10, 50, 30],
                "segmentation": [corners],
                "keypoints": [21, 11, 2, 49, 29, 2],
            },
            {**common, "bbox": [0, 0, 60, 40], "iscrowd": 1, "segmentation": full},
        ],
    }


def test_without_keys_the_augmentations_are_detectron2s() -> None:
    cfg = config()
    assert [type(a) for a in build_augmentations(cfg)] == [T.ResizeShortestEdge, T.RandomFlip]
    cfg.INPUT.CROP.ENABLED = True
    assert type(build_augmentations(cfg)[0]) is T.RandomCrop


def test_jitter_resizes_then_crops_its_window() -> None:
    # Pixel (y, x) has the value 100 y + x, so that a window shows its place.
    image = (np.arange(20)[:, None] * 100 + np.arange(40)[None, :]).astype(np.float32)[..., None]
    jitter = ScaleJitter(scale=(2.0, 2.0), size=(10, 20))
    # Factor 1 fits 20 x 40 into 10 x 20; factor 2 keeps the size.
    corners = set()
    for draw in range(60):
        seed_all(draw)
        transform = jitter.get_transform(image)
        assert transform.apply_coords(np.array([[0.0, 0.0]])).max() <= 0
        window = transform.apply_image(image)[..., 0]
        assert window.shape == (10, 20)
        y, x = divmod(int(window[0, 0]), 100)
        assert window[-1, -1] == (y + 9) * 100 + x + 19
        assert transform.apply_coords(np.array([[x, y]])).tolist() == [[0, 0]]
        corners.add((y, x))
    rows, columns = zip(*corners, strict=True)
    assert (min(rows), max(rows), min(columns), max(columns)) == (0, 10, 0, 20)
    # Not only along the diagonal.
    assert np.corrcoef(rows, columns)[0, 1] < 0.5


def test_jitter_draws_the_factor_uniformly_and_keeps_at_least_one_pixel() -> None:
    jitter = ScaleJitter(scale=(0.5, 1.0), size=(100, 100))
    sides = []
    for draw in range(300):
        seed_all(draw)
        sides.append(jitter.get_transform(np.zeros((50, 50, 3))).transforms[0].new_h)
    assert min(sides) in range(50, 53) and max(sides) in range(98, 101)
    assert np.mean(sides) == pytest.approx(75, abs=3)
    thin = np.zeros((1000, 2, 3), np.uint8)
    shrunk = ScaleJitter(scale=(0.1, 0.1), size=(100, 100)).get_transform(thin).apply_image(thin)
    assert shrunk.shape == (10, 1, 3)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_a_small_image_is_padded_and_its_objects_stay_on_it(
    record: dict[str, Any], mask_format: str
) -> None:
    cfg = config(
        INPUT__JITTER__ENABLED=True,
        INPUT__JITTER__SCALE=(0.5, 0.5),
        INPUT__JITTER__SIZE=(80, 60),
        INPUT__RANDOM_FLIP="none",
        INPUT__MASK_FORMAT=mask_format,
    )
    sample = build_train_mapper(cfg)(record)
    # 60 x 40 fits into the window; half of that is 30 x 20.
    assert sample["image"].shape == (3, 80, 60)
    white = sample["image"][0] > 200
    assert white[6:14, 11:24].all() and not white[:4].any() and not white[:20, :9].any()
    assert (sample["image"][:, 20:] == 128).all() and (sample["image"][:, :, 30:] == 128).all()
    # The crowd is not an object.
    (box,) = sample["instances"].gt_boxes.tensor.tolist()
    assert box == [10, 5, 25, 15]
    masks = sample["instances"].gt_masks
    if mask_format == "polygon":
        masks = BitMasks.from_polygon_masks(masks, 80, 60)
    expected = torch.zeros(80, 60, dtype=torch.bool)
    expected[5:15, 10:25] = True
    assert torch.equal(masks.tensor[0], expected)


@pytest.mark.parametrize("rle", [False, True])
def test_a_cropped_object_keeps_its_part_in_the_window_and_one_outside_is_removed(
    record: dict[str, Any], rle: bool
) -> None:
    if rle:
        record["annotations"][0]["segmentation"] = mask_util.merge(
            mask_util.frPyObjects(record["annotations"][0]["segmentation"], HEIGHT, WIDTH)
        )
    cfg = config(
        MODEL__KEYPOINT_ON=False,
        INPUT__JITTER__ENABLED=True,
        INPUT__JITTER__SCALE=(4.0, 4.0),
        INPUT__JITTER__SIZE=(10, 15),
        INPUT__RANDOM_FLIP="none",
    )
    # At the original size, in windows of 15 x 10.
    mapper = build_train_mapper(cfg)
    counts = {0: 0, 1: 0}
    for draw in range(40):
        seed_all(draw)
        sample = mapper(record)
        white = sample["image"][0] > 128
        objects = sample["instances"]
        counts[len(objects)] += 1
        assert len(objects) == white.any()
        if len(objects):
            ys, xs = torch.nonzero(white, as_tuple=True)
            expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert objects.gt_boxes.tensor[0].tolist() == [int(value) for value in expected]
            masks = BitMasks.from_polygon_masks(objects.gt_masks, 10, 15).tensor
            assert torch.equal(masks[0], white)
    assert min(counts.values()) > 3


def test_keypoints_move_with_the_image_and_lose_their_label_outside(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        INPUT__JITTER__ENABLED=True,
        INPUT__JITTER__SCALE=(4.0, 4.0),
        INPUT__JITTER__SIZE=(20, 30),
        INPUT__RANDOM_FLIP="none",
    )
    # Twice as large, 80 x 120; the window of 20 x 30 starts at (x 35, y 15).
    monkeypatch.setattr(np.random, "uniform", lambda *range, size=None: 4.0 if range else PLACE)
    PLACE = np.array([15.5 / 61, 35.5 / 91])
    mapper = build_train_mapper(cfg)
    inner = mapper._mapper._mapper
    inner.use_keypoint = True
    sample = mapper(record)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[5, 5, 30, 20]]
    # (21, 11) -> (42, 22) -> (7, 7), and (49, 29) -> (98, 58) -> outside.
    assert sample["instances"].gt_keypoints.tensor.tolist() == [[[7, 7, 2], [0, 0, 0]]]


def colour(change: T.Augmentation, pixel: tuple[int, int, int], draw: int = 0) -> np.ndarray:
    seed_all(draw)
    image = np.tile(np.array(pixel, np.uint8), (4, 5, 1))
    return change.get_transform(image).apply_image(image)[0, 0].astype(int)


def test_colours_change_by_the_given_amount(record: dict[str, Any]) -> None:
    cfg = config(INPUT__COLOR__BRIGHTNESS=0.5, INPUT__RANDOM_FLIP="none")
    *_, brightness = build_augmentations(cfg)
    values = [colour(brightness, (100, 100, 100), draw)[0] for draw in range(200)]
    assert min(values) in range(50, 56) and max(values) in range(145, 151)

    cfg = config(INPUT__COLOR__SATURATION=1.0, INPUT__RANDOM_FLIP="none")
    *_, saturation = build_augmentations(cfg)
    # Pure red in BGR is 76 of 255 as grey. In between, blue and green rise equally.
    reds = []
    for draw in range(100):
        blue, green, red = colour(saturation, (0, 0, 255), draw)
        reds.append(red)
        assert blue == green and (red < 255) == (blue > 0)
        if blue:
            # On the line from (0, 0, 255) to (76, 76, 76).
            assert red == pytest.approx(255 - blue * (255 - 76.2) / 76.2, abs=4)
    assert min(reds) in range(76, 86)

    cfg = config(INPUT__COLOR__CONTRAST=0.5, INPUT__RANDOM_FLIP="none")
    *_, contrast = build_augmentations(cfg)
    image = np.array([[[50] * 3, [150] * 3]], np.uint8)
    spans = []
    for draw in range(200):
        seed_all(draw)
        low, high = contrast.get_transform(image).apply_image(image)[0, :, 0].astype(int)
        # Around the mean of 100, with 0.5 to 1.5 times the distance.
        assert low + high == pytest.approx(200, abs=2)
        spans.append(high - low)
    assert min(spans) in range(49, 56) and max(spans) in range(145, 152)


def test_lighting_is_the_same_in_rgb_and_bgr() -> None:
    pixel = (60, 120, 180)
    lighting = T.RandomLighting(25.5)
    rgb = colour(lighting, pixel, 3)
    assert (rgb != pixel).any()
    assert colour(InRGB(lighting), pixel[::-1], 3).tolist() == rgb[::-1].tolist()
    cfg = config(INPUT__COLOR__LIGHTING=25.5, INPUT__FORMAT="RGB")
    assert type(build_augmentations(cfg)[-1]) is T.RandomLighting
    cfg.INPUT.FORMAT = "BGR"
    *_, last = build_augmentations(cfg)
    assert type(last) is InRGB
    # Krizhevsky et al. 2012: a shift along ImageNet's principal colours, whose red parts are
    # (-0.5675, 0.7192, 0.4009), by their deviations 0.2175, 0.0188 and 0.0045 times 25.5 and a
    # normal draw.
    reds = [colour(last, pixel, draw)[2] for draw in range(400)]
    parts = np.array([0.5675, 0.7192, 0.4009]) * [0.2175, 0.0188, 0.0045] * 25.5
    assert np.std(reds) == pytest.approx(np.sqrt((parts**2).sum()), rel=0.1)
    assert np.mean(reds) == pytest.approx(180, abs=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_spreads_a_point_and_keeps_the_masks(channels: int) -> None:
    image = np.zeros((31, 31, channels), np.float32)
    image[15, 15] = 1
    transform = RandomBlur(sigma=(2.0, 2.0)).get_transform(image)
    blurred = transform.apply_image(image)
    assert blurred.shape == image.shape and blurred.sum() == pytest.approx(channels, rel=1e-3)
    # A Gaussian of sigma 2: its height, and its variance along one axis.
    assert blurred[15, 15, 0] == pytest.approx(1 / (2 * np.pi * 4), rel=0.05)
    assert (blurred[..., 0].sum(0) * (np.arange(31) - 15.0) ** 2).sum() == pytest.approx(4, rel=0.1)
    mask = np.eye(31, dtype=np.uint8)
    assert transform.apply_segmentation(mask) is mask
    cfg = config(INPUT__BLUR__PROB=0.25)
    *_, blur = build_augmentations(cfg)
    kinds = []
    for draw in range(200):
        seed_all(draw)
        kinds.append(type(blur.get_transform(image)))
    assert 30 < sum(kind is not T.NoOpTransform for kind in kinds) < 70


@pytest.mark.parametrize(
    ("shorter", "longest", "size", "expected"),
    [
        ((640, 800), 1333, (), (1024, 1024)),  # COCO's sizes, and the recipes with jitter
        ((128,), 1333, (), (160, 160)),
        ((800,), 640, (), (640, 640)),
        ((8,), 1333, (), (32, 32)),
        ((800,), 1333, (96, 64), (96, 64)),
    ],
)
def test_without_a_size_the_jitter_follows_the_other_sizes(
    shorter: tuple[int, ...], longest: int, size: tuple[int, ...], expected: tuple[int, int]
) -> None:
    cfg = config(
        INPUT__JITTER__ENABLED=True,
        INPUT__JITTER__SIZE=size,
        INPUT__MIN_SIZE_TRAIN=shorter,
        INPUT__MAX_SIZE_TRAIN=longest,
    )
    first, *_, last = build_augmentations(cfg)
    assert first.size == last.size == expected


def test_padding_comes_after_the_colours() -> None:
    cfg = config(INPUT__JITTER__ENABLED=True, INPUT__COLOR__BRIGHTNESS=0.9)
    kinds = [type(a) for a in build_augmentations(cfg)]
    assert kinds == [ScaleJitter, T.RandomFlip, InRGB, PadTo]


def test_a_cropped_triangle_gets_the_box_of_the_rest(record: dict[str, Any]) -> None:
    triangle = [20.0, 10.0, 50.0, 10.0, 20.0, 30.0]
    record["annotations"][0]["segmentation"] = [triangle]
    cfg = config(
        INPUT__JITTER__ENABLED=True,
        INPUT__JITTER__SCALE=(1.5, 1.5),
        INPUT__JITTER__SIZE=(20, 40),
        INPUT__RANDOM_FLIP="none",
    )
    # 40 x 60 becomes 30 x 45. The triangle from (15, 7.5) to (37.5, 22.5) may lose rows.
    mapper = build_train_mapper(cfg)
    cut = 0
    for draw in range(20):
        seed_all(draw)
        objects = mapper(record)["instances"]
        (polygon,) = objects.gt_masks.polygons[0]
        xs, ys = polygon[0::2], polygon[1::2]
        expected = [xs.min(), ys.min(), xs.max(), ys.max()]
        assert objects.gt_boxes.tensor[0].tolist() == pytest.approx(expected, abs=1e-4)
        # The slanted side ends further left if the upper edge is cut off.
        cut += ys.min() == 0 and xs.max() - xs.min() < 22
    assert cut > 2
