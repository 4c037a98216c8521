"""YOLO's segmentation labels: the pixels of each line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert import yolo
from tests.tools.convert.drawn import box, masks_of

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

CAT = "0 0.05 0.1 0.3 0.1 0.3 0.3 0.05 0.3"  # (2, 3) to (12, 9) of 40 x 30


def label(root: Path, name: str, *lines: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("layout", ["ultralytics", "roboflow", "flat"])
def test_each_line_covers_its_pixels(
    layout: str, save: Save, written: Written, tmp_path: Path
) -> None:
    root = tmp_path / "pets"
    images, labels, yaml = {
        "ultralytics": (
            "images/{}/",
            "labels/{}/",
            "path: /home/x/pets\ntrain: images/train\nval: images/val\n",
        ),
        "roboflow": ("{}/images/", "{}/labels/", "train: ../train/images\nval: ../val/images\n"),
        "flat": ("images/", "labels/", ""),
    }[layout]
    for split, name in (("train", "a"), ("val", "b"), ("train", "empty"), ("train", "none")):
        save(f"pets/{images.format(split)}{name}.png")
    label(root, f"{labels.format('train')}a.txt", CAT, "1 0.5 0 1 0 1 1 0.5 1", "")
    label(root, f"{labels.format('val')}b.txt", CAT)
    label(root, f"{labels.format('train')}empty.txt", "")
    (root / "data.yaml").write_text(yaml + "nc: 2\nnames:\n  0: cat\n  1: dog\n")
    labels = yolo.read(root)
    assert not labels.skipped
    names = {p.name.rsplit("/", 1)[-1]: p for p in labels.images}
    assert names.keys() == {"a.png", "b.png", "empty.png", "none.png"}
    expected = ("", "") if layout == "flat" else ("train", "val")
    assert (names["a.png"].split, names["b.png"].split) == expected
    coco = written(labels)
    (cat, first), (dog, second) = masks_of(coco, names["a.png"].name)
    assert (cat, dog) == ("cat", "dog")
    np.testing.assert_array_equal(first, box(30, 40, 2, 3, 12, 9))
    np.testing.assert_array_equal(second, box(30, 40, 20, 0, 40, 30))


@pytest.mark.parametrize("place", ["images/{}/{}.png", "{}/images/{}.png"])
def test_without_a_yaml_folders_are_the_splits(place: str, save: Save, tmp_path: Path) -> None:
    for folder, name in (("train", "a"), ("valid", "b"), ("test", "c"), ("more", "d")):
        path = place.format(folder, name)
        save(f"pets/{path}")
        label(tmp_path / "pets", path.replace("images", "labels")[:-4] + ".txt", CAT)
    labels = yolo.read(tmp_path / "pets", classes=["cat"])
    splits = {p.path.stem: p.split for p in labels.images if p.path}
    # Images in other folders are split at random.
    assert splits == {"a": "train", "b": "val", "c": "test", "d": ""}


def test_only_a_train_folder_gives_no_splits(save: Save, tmp_path: Path) -> None:
    save("pets/images/train/a.png")
    label(tmp_path / "pets", "labels/train/a.txt", CAT)
    assert [p.split for p in yolo.read(tmp_path / "pets", classes=["cat"]).images] == [""]


def test_fractions_refer_to_the_upright_image(save: Save, written: Written, tmp_path: Path) -> None:
    save("pets/images/a.jpg", 30, 40, orientation=6)  # upright 40 wide, 30 high
    label(tmp_path / "pets", "labels/a.txt", CAT)
    coco = written(yolo.read(tmp_path / "pets", classes=["cat"]))
    np.testing.assert_array_equal(masks_of(coco, "a.jpg")[0][1], box(30, 40, 2, 3, 12, 9))


def test_invalid_lines_are_listed(save: Save, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    save("pets/images/a.png")
    label(
        root,
        "labels/a.txt",
        CAT,
        "0 0.5 0.5 0.1 0.1",
        "7 0 0 1 0 1 1",
        "0 0 0 1 0 1",
        "0 0 0 400 0 400 300",
        "0 nan 0 1 0 1 1",
        "cat 0 0 1 0 1 1",
        "0.5 0 0 1 0 1 1",
    )
    with pytest.raises(UserError, match="--classes"):
        yolo.read(root)
    (root / "data.yaml").write_text("names: [cat]\nval: images/valid\ntrain: images\n")
    labels = yolo.read(root)
    skipped = [place for places in labels.skipped.values() for place in places]
    assert [p.rsplit("a.txt:", 1)[-1] for p in skipped[1:]] == [
        *("2", "3 (class 7)", "4", "5", "6", "7", "8")
    ]
    assert skipped[0] == "val: images/valid"
    assert len(labels.images[0].objects) == 1


def test_labels_of_only_boxes_are_refused(save: Save, tmp_path: Path) -> None:
    save("pets/images/a.png")
    label(tmp_path / "pets", "labels/a.txt", "0 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError, match="detection labels have no masks"):
        yolo.read(tmp_path / "pets", classes=["cat"])


def test_a_yaml_runs_no_code_and_reads_no_other_folder(save: Save, tmp_path: Path) -> None:
    save("secret/images/a.png")
    save("pets/images/a.png")
    path = tmp_path / "pets" / "data.yaml"
    path.write_text("names: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match=r"data\.yaml' is not valid YAML"):
        yolo.read(path)
    path.write_text(f"names: [cat]\ntrain: {tmp_path}/secret/images\nval: ../secret/images\n")
    # The end of each path is looked up next to the yaml: pets/images.
    assert {p.path for p in yolo.read(path).images} == {tmp_path / "pets" / "images" / "a.png"}
