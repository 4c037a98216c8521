"""Pixel formats: VOC's pictures of objects and classes, folders of binary masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert import masks, voc
from mask_rcnn_tools.convert.labels import turn
from tests.tools.convert.drawn import box, masks_of

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

RING = box(30, 40, 5, 5, 15, 15) & ~box(30, 40, 8, 8, 12, 12)
BLOCK = box(30, 40, 20, 10, 30, 20)


def palette(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8), "P")
    image.putpalette([value for index in range(256) for value in voc._colour(index)])
    image.save(path)


def add_voc(root: Path, name: str, parts: list[tuple[np.ndarray, int]], void: Any = None) -> None:
    objects, classes = np.zeros((2, *RING.shape), np.uint8)
    for number, (mask, kind) in enumerate(parts, 1):
        objects[mask], classes[mask] = number, kind
    if void is not None:
        objects[void] = classes[void] = 255
    palette(root / "SegmentationObject" / f"{name}.png", objects)
    palette(root / "SegmentationClass" / f"{name}.png", classes)


def test_voc_objects_with_holes_and_void(save: Save, written: Written, tmp_path: Path) -> None:
    root = tmp_path / "VOC2012"
    for name in ("a", "b", "plain", "unmasked"):
        save(f"VOC2012/JPEGImages/{name}.jpg")
    border = box(30, 40, 20, 10, 30, 11)
    add_voc(root, "a", [(RING, 8), (BLOCK, 12)], void=border)
    add_voc(root, "b", [(BLOCK, 8)])
    add_voc(root, "plain", [])
    add_voc(root, "gone", [(BLOCK, 8)])
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\nplain\n")
    (sets / "val.txt").write_text("b\n")
    labels = voc.read(root)
    assert {p.name: p.split for p in labels.images} == {
        "a.jpg": "train",
        "b.jpg": "val",
        "plain.jpg": "train",
    }
    # The missing image is skipped; the void is not an object.
    assert [("gone" in place) for places in labels.skipped.values() for place in places] == [True]
    assert "1 of 4" in str(labels.noted)
    coco = written(labels)
    assert coco["categories"][7] == {"id": 8, "name": "cat"}
    (cat, ring), (dog, block) = masks_of(coco, "a.jpg")
    assert (cat, dog) == ("cat", "dog")
    np.testing.assert_array_equal(ring, RING)  # with its hole
    np.testing.assert_array_equal(block, BLOCK & ~border)
    assert masks_of(coco, "plain.jpg") == []


def test_voc_with_colours_as_cvat_writes_it(save: Save, written: Written, tmp_path: Path) -> None:
    root = tmp_path / "cvat"
    save("cvat/JPEGImages/a.jpg")
    (root / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:10,20,30::\nnut:1,2,3::\n"
    )
    for folder, colours in (
        ("SegmentationObject", [(128, 0, 0), (0, 128, 0)]),
        ("SegmentationClass", [(1, 2, 3), (10, 20, 30)]),
    ):
        pixels = np.zeros((30, 40, 3), np.uint8)
        pixels[RING], pixels[BLOCK] = colours
        (root / folder).mkdir()
        Image.fromarray(pixels).save(root / folder / "a.png")
    objects = dict(masks_of(written(voc.read(root)), "a.jpg"))
    np.testing.assert_array_equal(objects["nut"], RING)
    np.testing.assert_array_equal(objects["cat"], BLOCK)


def test_voc_needs_names_and_folders(save: Save, tmp_path: Path) -> None:
    root = tmp_path / "mine"
    save("mine/JPEGImages/a.jpg")
    with pytest.raises(UserError, match="'SegmentationObject'"):
        voc.read(root)
    add_voc(root, "a", [(RING, 1), (BLOCK, 3)])
    with pytest.raises(UserError, match="--classes"):
        voc.read(root)
    labels = voc.read(root, classes=["cat", "dog"])
    assert [labelled.label for labelled in labels.images[0].objects] == ["cat"]
    assert "object 2 (class [3])" in str(labels.skipped)
    (root / "class_names.txt").write_text("_background_\ncat\ndog\nowl\n")  # labelme's
    assert [t.label for t in voc.read(root).images[0].objects] == ["cat", "owl"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turn_equals_exif_transpose(orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7), np.uint8)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(turn(pixels, orientation), ImageOps.exif_transpose(image))


def save_mask(path: Path, mask: np.ndarray, value: int = 255) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((mask * value).astype(np.uint8)).save(path)


@pytest.mark.parametrize("layout", ["folders", "names", "kaggle"])
@pytest.mark.parametrize("value", [1, 255])
def test_binary_masks(
    layout: str, value: int, save: Save, written: Written, tmp_path: Path
) -> None:
    root = tmp_path / "cells"
    if layout == "kaggle":
        save("cells/a/images/a.png"), save("cells/empty/images/x.png")
        save("cells/.cache/images/x.png"), (root / "a/images/._a.png").write_bytes(b"\0\5\x16\7")
        first, second = root / "a" / "masks" / "1.png", root / "a" / "masks" / "odd" / "2.png"
    else:
        save("cells/images/a.png"), save("cells/images/a_b.png"), save("cells/images/empty.png")
        folders = layout == "folders"
        first = root / "masks" / ("a/1.png" if folders else "a_1.png")
        second = root / "masks" / ("a/odd/2.png" if folders else "odd/a_2.png")
        save_mask(root / "masks" / ("a_b/1.png" if folders else "a_b_1.png"), BLOCK, value)
    save_mask(first, RING, value)
    save_mask(second, BLOCK, value)
    labels = masks.read(root, class_name="cell")
    names = {"a.png", "empty.png"} | ({"a_b.png"} if layout != "kaggle" else set())
    assert {image.name for image in labels.images} == names
    coco = written(labels)
    objects = dict(masks_of(coco, "a.png"))
    np.testing.assert_array_equal(objects["cell"], RING)
    np.testing.assert_array_equal(objects["odd"], BLOCK)
    assert len(objects) == 2
    if layout != "kaggle":
        ((_, mask),) = masks_of(coco, "a_b.png")
        np.testing.assert_array_equal(mask, BLOCK)
    assert masks_of(coco, "empty.png") == [] and not labels.skipped


def test_invalid_masks_are_listed(save: Save, tmp_path: Path) -> None:
    save("cells/images/a.png")
    folder = tmp_path / "cells" / "masks"
    save_mask(folder / "a_1.png", RING)
    save_mask(folder / "a_empty.png", RING & False)
    save_mask(folder / "a_grey.png", RING * 100 + BLOCK * 50, 1)
    save_mask(folder / "a_small.png", RING[:10])
    save_mask(folder / "nobody.png", RING)
    (folder / "a_text.png").write_text("not an image")
    labels = masks.read(tmp_path / "cells")
    skipped = [place for places in labels.skipped.values() for place in places]
    assert len(skipped) == 5 and len(labels.images[0].objects) == 1
    assert any("a_grey.png has 3 values" in place for place in skipped)
    assert any("a_small.png" in p and "40 x 10" in p and "40 x 30" in p for p in skipped)
    with pytest.raises(UserError, match="NAME/masks/"):
        masks.read(folder)


@pytest.mark.parametrize(("size", "fits"), [((30, 40), True), ((40, 30), True), ((40, 40), False)])
def test_masks_of_an_image_with_exif_orientation(
    size: tuple[int, int], fits: bool, save: Save, written: Written, tmp_path: Path
) -> None:
    # Stored 40 wide and 30 high; upright, after a turn by 90 degrees, 30 wide and 40 high.
    save("cells/images/a.jpg", 40, 30, orientation=6)
    stored = box(30, 40, 5, 5, 15, 8)
    seen = box(40, 30, 22, 5, 25, 15)
    mask = {(30, 40): stored, (40, 30): seen}.get(size, np.ones(size, bool))
    save_mask(tmp_path / "cells" / "masks" / "a.png", mask)
    labels = masks.read(tmp_path / "cells")
    if fits:
        np.testing.assert_array_equal(masks_of(written(labels), "a.jpg")[0][1], seen)
    else:
        assert sum(map(len, labels.skipped.values())) == 1


def test_masks_of_unknown_orientation_are_skipped(save: Save, tmp_path: Path) -> None:
    save("cells/images/a.jpg", 40, 30, orientation=3)  # upside down, which the size does not show
    save_mask(tmp_path / "cells" / "masks" / "a.png", RING)
    labels = masks.read(tmp_path / "cells")
    assert "EXIF orientation 3" in str(labels.skipped) and not labels.images[0].objects
