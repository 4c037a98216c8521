"""Everything that a reader leaves out is counted and named: unknown files, missing images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mask_rcnn_plus import UserError
from mask_rcnn_tools.cli import main
from mask_rcnn_tools.convert import Labels, Plan, labelme, masks, via, voc, write_coco, yolo
from tests.tools.convert.drawn import masks_of
from tests.tools.convert.test_labelme import label as label_labelme
from tests.tools.convert.test_labelme import shape
from tests.tools.convert.test_pixels import BLOCK, RING, add_voc, save_mask
from tests.tools.convert.test_via import metadata, write
from tests.tools.convert.test_yolo import CAT
from tests.tools.convert.test_yolo import label as label_yolo

Save = Callable[..., Path]
Written = Callable[..., dict[str, Any]]

BOX = shape("cat", [[2, 3], [12, 8]], "rectangle")


def places(group: dict[str, list[str]], what: str) -> list[str]:
    """The places whose reason contains a text."""
    return [place for reason, found in group.items() if what in reason for place in found]


def objects(labels: Labels) -> dict[str, list[str]]:
    return {image.name: [o.label for o in image.objects] for image in labels.images}


@pytest.mark.parametrize("name", ["labelme", "via", "voc", "yolo", "masks"])
def test_unknown_files_are_skipped_or_noted(name: str, save: Save, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    if name == "labelme":
        label_labelme(save("pets/a.png"), [BOX])
        read, folder = labelme.read, root
    elif name == "via":
        write(root / "via.json", metadata(save("pets/a.png")))
        read, folder = via.read, root
    elif name == "voc":
        save("pets/JPEGImages/a.png"), add_voc(root, "a", [(RING, 1)])
        (root / "class_names.txt").write_text("cat\n")
        read, folder = voc.read, root / "SegmentationObject"
    elif name == "yolo":
        save("pets/images/a.png"), label_yolo(root, "labels/a.txt", CAT)
        (root / "data.yaml").write_text("names: [cat]\n")
        read, folder = yolo.read, root / "images"
    else:
        save("pets/images/a.png"), save_mask(root / "masks/a_1.png", RING)
        read, folder = masks.read, root / "masks"
    assert not read(root).skipped
    (folder / "b.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "c.npy").write_bytes(b"\x93NUMPY")
    (folder / "d").write_bytes(b"?")
    (folder / "README.md").write_text("pets")
    (folder / ".hidden.npy").write_bytes(b"")
    labels = read(root)
    assert objects(labels) == objects(read(root)) and len(labels.images) == 1
    skipped = sorted(Path(place.split(" is ")[0]).name for place in places(labels.skipped, ""))
    assert skipped == ["b.HEIC", "c.npy", "d"]
    assert "JPEG" in str(labels.skipped)
    assert str(folder / "README.md") in places(labels.noted, "")


def test_images_that_no_label_file_names_are_noted(save: Save, tmp_path: Path) -> None:
    write(tmp_path / "photos" / "via.json", metadata(save("photos/a.png")))
    other = save("photos/deep/b.png")
    assert places(via.read(tmp_path / "photos").noted, "no VIA file") == [str(other)]
    label_labelme(save("x/a.png"), [BOX])
    labels = labelme.read(tmp_path / "x", images=tmp_path / "photos")
    assert str(other) in places(labels.noted, "no json")
    save("pets/images/train/a.png"), save("pets/images/spare/b.png")
    label_yolo(tmp_path / "pets", "labels/train/a.txt", CAT)
    label_yolo(tmp_path / "pets", "labels/spare/b.txt", CAT)
    (tmp_path / "pets/data.yaml").write_text("names: [cat]\ntrain: images/train\n")
    labels = yolo.read(tmp_path / "pets")
    assert [Path(p).name for p in places(labels.noted, "no split of data.yaml")] == ["b.png"]
    assert not labels.skipped


def test_masks_of_a_missing_image_become_objects_of_no_other(save: Save, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        for part in (1, 2, 3):
            save_mask(tmp_path / f"cells/masks/{number}/{part}.png", RING)
    save("cells/images/1.png"), save("cells/images/3.png")  # 2.png is gone
    labels = masks.read(tmp_path / "cells", class_name="cell")
    assert objects(labels) == {"1.png": ["cell"] * 3, "3.png": ["cell"] * 3}
    assert len(places(labels.skipped, "without an image")) == 3


def test_a_mask_that_may_belong_to_a_missing_image_is_noted(save: Save, tmp_path: Path) -> None:
    save("cells/images/img.png"), save("cells/images/other.png")
    for name in ("img_1", "img_2", "other_1", "img_b_1"):  # img_b.png is gone
        save_mask(tmp_path / f"cells/masks/{name}.png", RING)
    labels = masks.read(tmp_path / "cells")
    assert [Path(p).name for p in places(labels.noted, "longer names")] == ["img_b_1.png"]


def test_images_outside_the_layout_are_skipped(save: Save, tmp_path: Path) -> None:
    for name in ("train/images/a.png", "train/images/b.png", "more/images/c.png", "d.png"):
        save(f"cells/{name}")
    save_mask(tmp_path / "cells/train/masks/a.png", RING)
    save_mask(tmp_path / "cells/more/masks/c.png", RING)
    labels = masks.read(tmp_path / "cells")
    assert sorted(objects(labels)) == ["more/c.png", "train/a.png", "train/b.png"]
    assert [Path(place).name for place in places(labels.skipped, "")] == ["d.png"]


def test_label_files_without_an_image_are_skipped(save: Save, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    save("pets/images/a.png"), label_yolo(root, "labels/a.txt", CAT)
    label_yolo(root, "labels/gone.txt", CAT), label_yolo(root, "labels/classes.txt", "cat")
    labels = yolo.read(root, classes=["cat"])
    assert [Path(p).name for p in places(labels.skipped, "no image")] == ["gone.txt"]
    assert objects(labels) == {"a.png": ["cat"]}


def test_images_that_differ_only_in_their_ending(save: Save, tmp_path: Path) -> None:
    (
        save("cells/images/a.png"),
        save("cells/images/a.bmp"),
        save_mask(tmp_path / "cells/masks/a.png", RING),
    )
    labels = masks.read(tmp_path / "cells")
    assert len(labels.images) == 1 and len(places(labels.skipped, "ending")) == 1
    (
        save("pets/images/a.png"),
        save("pets/images/a.bmp"),
        label_yolo(tmp_path / "pets", "labels/a.txt", CAT),
    )
    both = objects(yolo.read(tmp_path / "pets", classes=["cat"]))
    assert both == {"a.png": ["cat"], "a.bmp": ["cat"]}  # both have the label file a.txt


def yolo_lists(root: Path, save: Save, *lines: str) -> Labels:
    for name in ("1", "2"):
        (
            save(f"{root.name}/images/train/{name}.png"),
            label_yolo(root, f"labels/train/{name}.txt", CAT),
        )
    (root / "data.yaml").write_text("path: /content/ds\ntrain: train.txt\nnames: [cat]\n")
    (root / "train.txt").write_text("\n".join(lines) + "\n")
    return yolo.read(root)


@pytest.mark.parametrize(
    "top",
    ["/content/ds/images/train/", "data/images/train/", "D:\\ds\\images\\train\\", "./train/"],
)
def test_a_list_with_paths_of_another_machine(top: str, save: Save, tmp_path: Path) -> None:
    labels = yolo_lists(tmp_path / "ds", save, f"{top}1.png", f"{top}2.png")
    assert objects(labels) == {"train/1.png": ["cat"], "train/2.png": ["cat"]}
    assert len(places(labels.noted, "another folder")) == 2 and not labels.skipped


def test_missing_images_of_a_list_are_counted(save: Save, tmp_path: Path) -> None:
    labels = yolo_lists(tmp_path / "ds", save, "/content/ds/images/train/1.png", "/x/val/2.png")
    assert list(objects(labels)) == ["train/1.png"]
    (place,) = places(labels.skipped, "images are missing")
    assert place.endswith("'/x/val/2.png'")


def test_empty_and_unreadable_image_folders_of_a_yaml(save: Save, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    save("pets/images/a.png"), label_yolo(root, "labels/a.txt", CAT)
    (root / "empty").mkdir()
    (root / "list.txt").write_bytes(b"\xff\x00\xfe")
    (root / "data.yaml").write_text("names: [cat]\ntrain: [images, empty, list.txt]\ntest: null\n")
    labels = yolo.read(root)
    assert [Path(p.split(" ")[0]).name for p in places(labels.skipped, "")] == [
        "empty",
        "list.txt",
    ]
    for value in ("[[images]]", "{a: b}", "[{}]"):
        (root / "data.yaml").write_text(f"names: [cat]\ntrain: {value}\n")
        with pytest.raises(UserError, match="'train'"):
            yolo.read(root)


def test_images_in_two_splits_stay_in_both(save: Save, written: Written, tmp_path: Path) -> None:
    root = tmp_path / "coco8"
    save("coco8/images/a.png"), label_yolo(root, "labels/a.txt", CAT)
    (root / "data.yaml").write_text("names: [cat]\ntrain: images\nval: images\ntest: images\n")
    labels = yolo.read(root)
    jsons = write_coco(labels, Plan(tmp_path / "out", "yolo"))
    for path in jsons:
        content = json.loads(path.read_text())
        assert len(content["images"]) == len(content["annotations"]) == 1
    assert [path.stem for path in jsons] == ["train", "val", "test"]
    assert "--val" in str(labels.noted) and places(labels.noted, "several splits")


@pytest.mark.parametrize("name", ["labelme", "via", "masks", "masks in folders"])
def test_folders_named_train_and_val_are_the_splits(name: str, save: Save, tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for split in ("train", "val"):
        for stem in ("a", "b"):
            path = {"masks": f"images/{split}/", "masks in folders": f"{split}/images/"}
            image = save(f"pets/{path.get(name, f'{split}/')}{stem}.png")
            if name == "labelme":
                label_labelme(image, [BOX])
            elif name == "masks":
                save_mask(root / f"masks/{split}/{stem}_1.png", RING)
            elif name == "masks in folders":
                save_mask(root / f"{split}/masks/{stem}_1.png", RING)
        if name == "via":
            files = metadata(image.with_name("a.png")) | metadata(image)
            write(root / split / "via_region_data.json", files)
    read = {"labelme": labelme.read, "via": via.read}.get(name, masks.read)
    labels = read(root)
    assert {image.name: image.split for image in labels.images} == {
        f"{split}/{stem}.png": split for split in ("train", "val") for stem in ("a", "b")
    }
    assert all(image.objects for image in labels.images) and not labels.skipped
    if name == "via":  # a single such folder is not a split
        labels = via.read(root / "val")
        assert {image.split for image in labels.images} == {""}
    if name == "labelme":
        (root / "val").rename(root / "more")
        labels = labelme.read(root)
        assert {image.split for image in labels.images} == {""} and places(labels.noted, "only one")


def test_images_in_no_split_are_noted(save: Save, tmp_path: Path, written: Written) -> None:
    root = tmp_path / "VOC2012"
    for stem in ("a", "b", "c"):
        save(f"VOC2012/JPEGImages/{stem}.jpg"), add_voc(root, stem, [(BLOCK, 8)])
    sets = root / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("a\ngone\n")
    (sets / "test.txt").write_text("b\n")
    labels = voc.read(root)
    assert places(labels.skipped, "ImageSets") == ["gone"]
    assert [image.split for image in labels.images] == ["train", "test", ""]
    write_coco(labels, Plan(tmp_path / "out", "voc"))
    assert places(labels.noted, "no split") == ["c.jpg"]


def test_voc_names_with_dots_and_other_capitals(
    save: Save, written: Written, tmp_path: Path
) -> None:
    root = tmp_path / "VOC2012"
    save("VOC2012/JPEGImages/2012.01.a.JPG"), add_voc(root, "2012.01.A", [(BLOCK, 8)])
    labels = voc.read(root)
    ((label, mask),) = masks_of(written(labels), "2012.01.a.JPG")
    assert label == "cat" and (mask == BLOCK).all() and not labels.skipped
    assert places(labels.noted, "similar names")


def test_regions_of_a_wrong_type_are_not_dropped(save: Save, tmp_path: Path) -> None:
    image = save("photos/a.png")
    entries = metadata(image)
    entries["b"] = {"filename": save("photos/b.png").name, "regions": 5}
    write(image.with_name("via.json"), entries)
    labels = via.read(image.parent)
    assert {name: len(found) for name, found in objects(labels).items()} == {"a.png": 4, "b.png": 0}
    (place,) = places(labels.skipped, "")
    assert "'b.png' regions[0]" in place


def test_json_files_in_capitals_are_read(save: Save, tmp_path: Path) -> None:
    label_labelme(save("photos/a.png"), [BOX]).rename(tmp_path / "photos" / "a.JSON")
    assert objects(labelme.read(tmp_path / "photos")) == {"a.png": ["cat"]}


def test_an_error_says_why_no_object_is_left(save: Save, written: Written, tmp_path: Path) -> None:
    label_labelme(save("photos/a.png"), [BOX])
    # Many other reasons do not hide the one that is a typing error.
    for suffix in ("heic", "dng", "xyz", "abc", "def", "ghi", "jkl", "mno", "pqr"):
        (tmp_path / "photos" / f"{'long' * 20}.{suffix}").write_bytes(b"")
    with pytest.raises(UserError, match=r"'cat'.*--classes.*a\.png"):
        written(labelme.read(tmp_path / "photos"), classes=["cta"])


def test_a_link_to_a_folder_is_named_unless_a_reader_follows_it(
    tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shapes = [{"label": "cat", "points": [[2, 3], [12, 3], [12, 8]], "shape_type": "polygon"}]
    for folder in ("photos", "elsewhere"):
        image = save(f"{folder}/{folder}.png")
        content = {"imagePath": image.name, "imageHeight": 30, "imageWidth": 40, "shapes": shapes}
        image.with_suffix(".json").write_text(json.dumps(content))
    (tmp_path / "photos" / "more").symlink_to(elsewhere)
    run = ["convert", "labelme", str(tmp_path / "photos"), "--output", str(tmp_path / "new")]
    assert main([*run, "--split", "train"]) == 1
    assert "photos/more" in capsys.readouterr().out

    nuclei = tmp_path / "nuclei"
    save_mask(nuclei / "masks" / "elsewhere" / "1.png", BLOCK)
    (elsewhere / "elsewhere.json").unlink()
    (nuclei / "images").symlink_to(elsewhere)
    run = ["convert", "masks", str(nuclei), "--output", str(tmp_path / "new2")]
    assert main([*run, "--class-name", "nucleus", "--split", "train"]) == 0
