"""COCO json in the layouts of the tools that export it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.convert import coco
from mask_rcnn_tools.convert.labels import Labels
from mask_rcnn_tools.convert.writing import Plan, write_coco
from tests.tools.convert.drawn import box, masks_of

Save = Callable[..., Path]

SQUARE = [[4.0, 5.0, 20.0, 5.0, 20.0, 25.0, 4.0, 25.0]]
CAT = {"id": 1, "name": "cat", "supercategory": "pets"}
MASK = box(30, 40, 4, 5, 20, 25)


def content(*names: str, first_id: int = 1, **annotation: Any) -> dict[str, Any]:
    """A json of images of 40 x 30 pixels, each with one object."""
    ids = range(first_id, first_id + len(names))
    image = {"width": 40, "height": 30}
    fields = {"category_id": 1, "segmentation": SQUARE, "bbox": [4, 5, 16, 20], "iscrowd": 0}
    return {
        "images": [{"id": i, "file_name": n, **image} for i, n in zip(ids, names, strict=True)],
        "categories": [CAT],
        "annotations": [{"id": i, "image_id": i, **fields, **annotation} for i in ids],
    }


def save_json(path: Path, body: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body))


def roboflow(source: Path, save: Save) -> None:
    for number, split in enumerate(("train", "valid", "test")):
        save(f"source/{split}/{number}.jpg")
        body = content(f"{number}.jpg", first_id=0)
        body["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})
        save_json(source / split / "_annotations.coco.json", body)


def cvat(source: Path, save: Save) -> None:
    for number, split in enumerate(("Train", "Validation")):
        save(f"source/images/{split}/{number}.jpg")
        body = content(f"{number}.jpg", attributes={"occluded": False})
        save_json(source / f"annotations/instances_{split}.json", body)


def cvat_default(source: Path, save: Save) -> None:
    for number in range(2):
        save(f"source/images/default/{number}.jpg")
    body = content("0.jpg", "1.jpg", attributes={"occluded": False})
    save_json(source / "annotations/instances_default.json", body)


def label_studio(source: Path, save: Save) -> None:
    save("source/images/1a2b3c4d-0.jpg")
    save("source/images/1.jpg")
    names = "../../label-studio/data/media/upload/1/1a2b3c4d-0.jpg", "images\\1/5e6f7a8b-1.jpg"
    save_json(source / "result.json", content(*names, first_id=0))


def fiftyone(source: Path, save: Save) -> None:
    for number in range(2):
        save(f"source/data/{number}.jpg")
    save_json(source / "labels.json", content("0.jpg", "1.jpg"))


def original(source: Path, save: Save) -> None:
    for number, split in enumerate(("train2017", "val2017")):
        save(f"source/{split}/{number}.jpg")
        save_json(source / f"annotations/instances_{split}.json", content(f"{number}.jpg"))
        captions = {**content(f"{number}.jpg"), "categories": []}
        save_json(source / f"annotations/captions_{split}.json", captions)
        save_json(source / f"annotations/person_keypoints_{split}.json", content(f"{number}.jpg"))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (roboflow, {"train": ["0.jpg"], "val": ["1.jpg"], "test": ["2.jpg"]}),
        (cvat, {"train": ["0.jpg"], "val": ["1.jpg"]}),
        (cvat_default, {"train": ["1.jpg"], "val": ["0.jpg"]}),
        (label_studio, {"train": ["1.jpg"], "val": ["1a2b3c4d-0.jpg"]}),
        (fiftyone, {"train": ["1.jpg"], "val": ["0.jpg"]}),
        (original, {"train": ["0.jpg"], "val": ["1.jpg"]}),
    ],
)
def test_the_layouts_of_exports(
    make: Callable[[Path, Save], None], names: dict[str, list[str]], tmp_path: Path, save: Save
) -> None:
    make(tmp_path / "source", save)
    labels = coco.read(tmp_path / "source")
    assert not labels.skipped
    jsons = write_coco(labels, Plan(tmp_path / "out", "coco"))
    contents = {path.stem: json.loads(path.read_text()) for path in jsons}
    assert {
        split: [image["file_name"] for image in body["images"]] for split, body in contents.items()
    } == names
    for body in contents.values():
        assert body["categories"] == [CAT]
        for image in body["images"]:
            assert (tmp_path / "out/images" / image["file_name"]).is_file()
            ((name, mask),) = masks_of(body, image["file_name"])
            assert name == "cat" and np.array_equal(mask, MASK)


def test_a_single_split_of_the_source_is_split_at_random(tmp_path: Path, save: Save) -> None:
    for number in range(2):
        save(f"source/train/{number}.jpg")
    body = content("0.jpg", "1.jpg")
    save_json(tmp_path / "source/train/_annotations.coco.json", body)
    jsons = write_coco(coco.read(tmp_path / "source"), Plan(tmp_path / "out", "coco"))
    assert [path.stem for path in jsons] == ["train", "val"]


@pytest.fixture
def read(tmp_path: Path, save: Save) -> Callable[..., Labels]:
    """Reads a json beside the image 0.jpg, with changes in its annotation."""

    def read(body: dict[str, Any] | None = None, **annotation: Any) -> Labels:
        save("source/0.jpg")
        save_json(tmp_path / "source/a.json", body or content("0.jpg", **annotation))
        return coco.read(tmp_path / "source/a.json")

    return read


Read = Callable[..., Labels]
Written = Callable[..., dict[str, Any]]
COUNTS = coco_mask.encode(np.asfortranarray(MASK, np.uint8))["counts"].decode()


@pytest.mark.parametrize(
    ("segmentation", "kept"),
    [
        (SQUARE, SQUARE),
        (SQUARE[0], SQUARE),
        ([[[4, 5], [20, 5], [20, 25], [4, 25]]], SQUARE),
        ([*SQUARE, [1, 1, 3, 3]], SQUARE),  # a polygon of two corners
        ([{"x": x, "y": y} for x, y in zip(SQUARE[0][::2], SQUARE[0][1::2], strict=True)], SQUARE),
        ({"all_points_x": SQUARE[0][::2], "all_points_y": SQUARE[0][1::2]}, SQUARE),
        ("4,5 20,5 20,25 4,25", SQUARE),
        (json.dumps({"size": [30, 40], "counts": COUNTS}), {"size": [30, 40], "counts": COUNTS}),
        ({"size": [30, 40], "counts": COUNTS}, {"size": [30, 40], "counts": COUNTS}),
        (
            {"size": [30, 40], "counts": [125, *[20, 10] * 15, 20, 605]},
            {"size": [30, 40], "counts": COUNTS},
        ),
    ],
)
def test_segmentations_are_kept(segmentation: Any, kept: Any, read: Read, written: Written) -> None:
    labels = read(segmentation=segmentation)
    (annotation,) = written(labels)["annotations"]
    assert annotation["segmentation"] == kept and annotation["area"] == MASK.sum()
    assert annotation["bbox"] == [4, 5, 16, 20]
    assert bool(labels.skipped) == (len(segmentation) == 2 and isinstance(segmentation, list))


def test_ids_crowds_and_keypoints_are_kept(read: Read, written: Written) -> None:
    body = content("0.jpg", first_id=7, iscrowd=1, keypoints=[5, 6, 2, 0, 0, 0])
    category = {"id": 30, "name": " cat ", "keypoints": ["nose", "tail"], "skeleton": [[1, 2]]}
    body["categories"] = [category, {"id": 20, "name": "dog"}]
    body["annotations"][0]["category_id"] = 30
    result = written(read(body))
    assert [image["id"] for image in result["images"]] == [7]
    assert result["categories"] == [{"id": 20, "name": "dog"}, {**category, "name": "cat"}]
    (annotation,) = result["annotations"]
    assert (annotation["id"], annotation["image_id"], annotation["category_id"]) == (7, 7, 30)
    assert annotation["iscrowd"] == 1
    assert (annotation["keypoints"], annotation["num_keypoints"]) == ([5, 6, 2, 0, 0, 0], 1)


@pytest.mark.parametrize("ids", [(0, 1), (1, 1), ("1", "2"), (2**60, 1)])
def test_invalid_annotation_ids_are_replaced(
    ids: tuple[Any, Any], read: Read, written: Written
) -> None:
    body = content("0.jpg")
    body["annotations"] = [{**body["annotations"][0], "id": number} for number in ids]
    assert [entry["id"] for entry in written(read(body))["annotations"]] == [1, 2]


@pytest.mark.parametrize(("value", "crowd"), [(False, 0), (0.0, 0), (None, 0), ("0", 0), (1, 1)])
def test_iscrowd_may_have_other_types(value: Any, crowd: int, read: Read, written: Written) -> None:
    (annotation,) = written(read(iscrowd=value))["annotations"]
    assert annotation["iscrowd"] == crowd


def test_brush_masks_of_cvat_are_objects(read: Read, written: Written) -> None:
    rle = {"size": [30, 40], "counts": COUNTS}
    labels = read(segmentation=rle, iscrowd=1, attributes={"occluded": False})
    assert len(next(places for what, places in labels.noted.items() if "CVAT" in what)) == 1
    assert written(labels)["annotations"][0]["iscrowd"] == 0
    # Without CVAT's attributes, and beside an object, it is a crowd.
    body = content("0.jpg", segmentation=rle, iscrowd=1)
    body["annotations"].append({**body["annotations"][0], "segmentation": SQUARE, "iscrowd": 0})
    labels = read(body)
    assert labels.noted == {}
    assert [a["iscrowd"] for a in written(labels, overwrite=True)["annotations"]] == [1, 0]
    # CVAT never writes a run length that is not a crowd.
    for annotation in body["annotations"]:
        annotation |= {"segmentation": rle, "attributes": {"occluded": False}}
    assert read(body).noted == {}


def test_brush_masks_are_found_wherever_they_are_in_the_json(read: Read, written: Written) -> None:
    body = content("0.jpg")
    body["annotations"].append(
        {
            **body["annotations"][0],
            "segmentation": {"size": [30, 40], "counts": COUNTS},
            "iscrowd": 1,
            "attributes": {"occluded": False},
        }
    )
    assert [a["iscrowd"] for a in written(read(body))["annotations"]] == [0, 0]


def test_boxes_are_kept_only_if_there_are_no_masks(read: Read, written: Written) -> None:
    labels = read(segmentation=[], bbox=[30, 20, 20, 5])
    (annotation,) = written(labels)["annotations"]
    assert annotation["bbox"] == [30, 20, 10, 5] and "segmentation" not in annotation
    assert labels.noted and not labels.skipped
    body = content("0.jpg")
    body["annotations"].append({**body["annotations"][0], "id": 2, "segmentation": []})
    labels = read(body)
    assert len(labels.images[0].objects) == 1
    ((what, places),) = labels.skipped.items()
    assert "no mask" in what and "annotations[1]" in places[0]


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("images", {"file_name": "2.jpg"}),
        ("images", {"file_name": None}),
        ("images", {"width": 30}),
        ("categories", {"name": 3}),
        ("annotations", {"image_id": 5}),
        ("annotations", {"category_id": [1]}),
        ("annotations", {"segmentation": "masks"}),
        ("annotations", {"segmentation": [[1, 2, 3]]}),
        ("annotations", {"segmentation": [[[1, 2], "x", [3, 4]]]}),
        ("annotations", {"segmentation": {"size": [40, 30], "counts": COUNTS}}),
        ("annotations", {"segmentation": None, "bbox": [1, 2, -3, 4]}),
        ("annotations", {"segmentation": None, "bbox": None}),
        ("annotations", {"keypoints": [1, 2, 3]}),
    ],
)
def test_invalid_entries_are_skipped_and_named(
    section: str, changes: dict[str, Any], read: Read
) -> None:
    body = content("0.jpg")
    body[section][0] |= changes
    labels = read(body)
    assert "a.json" in next(iter(labels.skipped.values()))[0]


def test_categories_of_several_jsons_are_matched_by_name(
    tmp_path: Path, save: Save, written: Written
) -> None:
    for split, ids in (("train", {"cat": 1, "dog": 2}), ("val", {"dog": 1, "cat": 2})):
        save(f"source/{split}/{split}.jpg")
        body = content(f"{split}.jpg")
        body["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
        save_json(tmp_path / "source" / split / "labels.json", body)
    result = written(coco.read(tmp_path / "source"))
    assert [name for name, _ in masks_of(result, "train.jpg")] == ["cat"]
    assert [name for name, _ in masks_of(result, "val.jpg")] == ["dog"]


def test_a_source_is_read_without_its_unreadable_files(read: Read, tmp_path: Path) -> None:
    read()
    (tmp_path / "source/b.json").write_text("{")
    (tmp_path / "source/c.json").write_text("[]")
    labels = coco.read(tmp_path / "source")
    assert len(labels.images) == 1
    assert "b.json" in labels.skipped["files cannot be read"][0]
    assert "c.json" in str(labels.noted)


def test_an_unknown_layout_names_what_was_looked_for_and_found(tmp_path: Path) -> None:
    save_json(tmp_path / "source/shapes.json", {"shapes": []})
    (tmp_path / "source/annotations.xml").write_text("<annotations/>")
    with pytest.raises(UserError, match=r"_annotations\.coco\.json.*annotations\.xml, shapes"):
        coco.read(tmp_path / "source")
    with pytest.raises(UserError, match=r"shapes\.json.*'images'"):
        coco.read(tmp_path / "source/shapes.json")
