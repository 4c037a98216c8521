"""Names that people type: labels, classes, files, and the encodings of text files."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.convert import labelme, masks, via, voc, yolo
from tests.tools.convert.test_labelme import label as label_labelme
from tests.tools.convert.test_labelme import shape
from tests.tools.convert.test_left_out import BOX, objects, places
from tests.tools.convert.test_pixels import RING, save_mask
from tests.tools.convert.test_via import metadata, write, write_csv
from tests.tools.convert.test_yolo import CAT
from tests.tools.convert.test_yolo import label as label_yolo

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

TRIANGLE = [[1, 1], [20, 1], [1, 20]]


def categories(coco: dict[str, Any]) -> list[str]:
    return [category["name"] for category in coco["categories"]]


def test_spaces_and_unicode_forms_make_no_second_class(save: Save, written: Written) -> None:
    names = ["café", " café", "café\u00a0", unicodedata.normalize("NFD", "café"), "traffic  light"]
    path = save("photos/a.png")
    label_labelme(path, [shape(name, TRIANGLE) for name in names])
    labels = labelme.read(path.parent)
    assert categories(written(labels)) == ["café", "traffic light"]
    assert len(places(labels.noted, "spaces")) == 4 and not labels.skipped


def test_a_group_of_shapes_is_one_object_despite_spaces(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label_labelme(path, [shape(name, TRIANGLE, group_id=1) for name in ("cat", "cat ")])
    assert len(written(labelme.read(path.parent))["annotations"]) == 1


def test_classes_that_differ_only_in_capitals_are_noted(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label_labelme(path, [shape(name, TRIANGLE) for name in ("cat", "Cat", "cat", "dog")])
    labels = labelme.read(path.parent)
    assert categories(written(labels)) == ["Cat", "cat", "dog"]
    assert places(labels.noted, "capitals") == ["'Cat' (1 objects), 'cat' (2 objects)"]


def test_labels_that_are_not_classes_are_left_out(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    names = ["__ignore__", "_background_", "cat", "__ignore__"]
    label_labelme(path, [shape(name, TRIANGLE) for name in names])
    labels = labelme.read(path.parent)
    assert categories(written(labels)) == ["cat"]
    assert len(places(labels.noted, "__ignore__")) == 2
    assert len(places(labels.noted, "_background_")) == 1


def test_classes_that_the_user_names_are_classes(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label_labelme(path, [shape(name, TRIANGLE) for name in ("__ignore__", "cat")])
    coco = written(labelme.read(path.parent), classes=["cat", "__ignore__"])
    assert len(coco["annotations"]) == 2


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("{0: no, 1: on}", ["no", "on"]),
        ("[01, 010]", ["01", "010"]),
        ("[8, 1.0]", ["8", "1.0"]),
        ("[null, ~]", ["null", "~"]),
        ("[2024-01-01, 1_0]", ["2024-01-01", "1_0"]),
        ('["cat", "cat "]', ["cat"]),
        ('["nut, M8", " bolt "]', ["nut, M8", "bolt"]),
    ],
)
def test_names_in_a_yaml_are_text(
    names: str, expected: list[str], save: Save, written: Written, tmp_path: Path
) -> None:
    save("pets/images/a.png"), label_yolo(tmp_path / "pets", "labels/a.txt", CAT)
    (tmp_path / "pets" / "data.yaml").write_text(f"names: {names}\n")
    assert categories(written(yolo.read(tmp_path / "pets"))) == expected


@pytest.mark.parametrize(
    "names", ["{1: cat, 2: dog}", "[cat, '']", "[[cat]]", "{a: cat}", "cat", "[cat, cat ]"]
)
def test_unusable_names_in_a_yaml(names: str, save: Save, written: Written, tmp_path: Path) -> None:
    save("pets/images/a.png"), label_yolo(tmp_path / "pets", "labels/a.txt", CAT)
    (tmp_path / "pets" / "data.yaml").write_text(f"names: {names}\n")
    with pytest.raises(UserError, match=r"names|named"):
        written(yolo.read(tmp_path / "pets"))


def test_class_names_with_commas(save: Save, written: Written) -> None:
    path = save("photos/a.png")
    label_labelme(path, [shape("nut, M8", TRIANGLE), shape("cat", TRIANGLE)])
    labels = labelme.read(path.parent)
    assert categories(written(labels, classes=["nut, M8"])) == ["nut, M8"]
    with pytest.raises(UserError, match="separate several names with spaces"):
        written(labelme.read(path.parent), classes=["cat,nut"])


def test_the_background_of_voc_is_not_a_class(tmp_path: Path) -> None:
    for folder in ("JPEGImages", "SegmentationObject", "SegmentationClass"):
        (tmp_path / folder).mkdir()
    with pytest.raises(UserError, match="'background'"):
        voc.read(tmp_path, classes=["background", "cat"])


@pytest.mark.parametrize(
    ("named", "how"),
    [
        ("C:\\pets\\images\\Café.jpg", "another folder"),
        (unicodedata.normalize("NFD", "Café.jpg"), "Unicode"),
        ("café.JPEG", "capitals"),
        ("1a2b3c4d-Caf%C3%A9.jpg", "upload"),
        ("images/images/Café.jpg", "another folder"),
    ],
)
@pytest.mark.parametrize("tool", ["labelme", "via", "yolo"])
def test_image_names_that_differ_from_the_files(
    tool: str, named: str, how: str, save: Save, tmp_path: Path
) -> None:
    image = save("pets/images/Café.jpg")
    if tool == "labelme":
        label_labelme(image, [BOX], imagePath=named).rename(image.with_name("other.json"))
        labels = labelme.read(tmp_path / "pets")
    elif tool == "via":
        ((key, entry),) = metadata(image).items()
        write(tmp_path / "pets/via.json", {key: {**entry, "filename": named}})
        labels = via.read(tmp_path / "pets/via.json", images=image.parent)
    else:
        label_yolo(tmp_path / "pets", "labels/Café.txt", CAT)
        (tmp_path / "pets/list.txt").write_text(named + "\n", encoding="utf-8")
        (tmp_path / "pets/data.yaml").write_text("names: [cat]\ntrain: list.txt\n")
        labels = yolo.read(tmp_path / "pets")
    assert [image.path.name for image in labels.images if image.path] == ["Café.jpg"]
    assert labels.images[0].objects and not labels.skipped
    assert len(places(labels.noted, how)) == 1


def test_an_image_name_that_fits_several_files(save: Save, tmp_path: Path) -> None:
    save("pets/x/a.jpg"), save("pets/y/a.jpg")
    image = save("pets/z/b.jpg")
    label_labelme(image, [BOX], imagePath="a.jpg").rename(image.with_name("other.json"))
    labels = labelme.read(tmp_path / "pets")
    (place,) = places(labels.skipped, "several files")
    assert "x/a.jpg" in place and "y/a.jpg" in place and not labels.images


@pytest.mark.parametrize("stem", ["A", "é", "1a2b3c4d-a"])
def test_label_files_and_masks_with_similar_names(stem: str, save: Save, tmp_path: Path) -> None:
    other = {"A": "a", "é": unicodedata.normalize("NFD", "é"), "1a2b3c4d-a": "a"}[stem]
    save(f"pets/images/{stem}.JPG"), label_yolo(tmp_path / "pets", f"labels/{other}.txt", CAT)
    save(f"cells/images/{stem}.JPG"), save_mask(tmp_path / f"cells/masks/{other}_1.png", RING)
    for labels in (
        yolo.read(tmp_path / "pets", classes=["object"]),
        masks.read(tmp_path / "cells"),
    ):
        assert objects(labels) == {f"{stem}.JPG": ["object"]}
        assert places(labels.noted, "similar names") and not labels.skipped


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_text_files_of_editors_on_windows(encoding: str, save: Save, tmp_path: Path) -> None:
    def recode(path: Path) -> None:
        path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))

    image = save("photos/a.png")
    recode(label_labelme(image, [shape("café", TRIANGLE)]))
    assert objects(labelme.read(image.parent)) == {"a.png": ["café"]}
    write_csv(tmp_path / "via.csv", image), recode(tmp_path / "via.csv")
    assert len(via.read(tmp_path / "via.csv", images=image.parent).images[0].objects) == 4
    root = tmp_path / "pets"
    save("pets/images/a.png"), label_yolo(root, "labels/a.txt", CAT), recode(root / "labels/a.txt")
    (root / "data.yaml").write_text("names: [café]\n", encoding="utf-8"), recode(root / "data.yaml")
    assert objects(yolo.read(root)) == {"a.png": ["café"]}


def test_text_of_another_encoding_says_what_to_do(save: Save, tmp_path: Path) -> None:
    path = label_labelme(save("photos/a.png"), [])
    path.write_bytes('{"shapes": [], "imagePath": "café.png"}'.encode("latin-1"))
    assert "save it with the encoding UTF-8" in str(labelme.read(path.parent).skipped)
    root = tmp_path / "pets"
    save("pets/images/a.png"), (root / "data.yaml").write_bytes("names: [café]".encode("latin-1"))
    with pytest.raises(UserError, match=r"data\.yaml' .*UTF-8"):
        yolo.read(root)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["bild", "café"])
def test_json_is_the_same_under_any_locale(stem: str, save: Save, tmp_path: Path) -> None:
    image = save(f"photos/{stem}.png")
    label_labelme(image, [shape("猫", TRIANGLE)], flags={"é": True})
    image.with_suffix(".json").rename(image.with_name("other.json"))
    written = []
    c_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:backslashreplace"}
    for number, environment in enumerate([{}, c_locale]):
        output = tmp_path / f"out{number}" / "pets"
        command = ["convert", "labelme", str(image.parent), "--output", str(output)]
        done = subprocess.run(
            [sys.executable, "-m", "mask_rcnn_tools.cli", *command],
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        written.append((output / "train.json").read_bytes())
    first, second = map(json.loads, written)
    assert first["categories"] == second["categories"] == [{"id": 1, "name": "猫"}]
    assert first["annotations"] == second["annotations"] and written[0].isascii()
    if stem.isascii():
        assert written[0] == written[1]
