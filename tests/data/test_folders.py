"""Data sets by folder: what is found, when it is read, and what is said about bad data."""

import json
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import (
    create_keypoint_hflip_indices,
    transform_instance_annotations,
)

from mask_rcnn_plus.data import (
    class_names,
    dataset_root,
    folders,
    register_folder_datasets,
    require_dataset,
)
from mask_rcnn_plus.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"

# Two images; category ids with a gap, out of order; whole numbers as many tools write them.
COCO: dict[str, Any] = {
    "images": [
        {"id": 5, "file_name": "b.png", "height": 40, "width": 50},
        {"id": 3, "file_name": "a.png", "height": 30, "width": 20},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 5,
            "category_id": 7,
            "bbox": [1, 2, 11, 13],
            "area": 143,
            "iscrowd": 0,
            "segmentation": [[1, 2, 12, 2, 12, 15, 1, 15]],
        },
        {
            "id": 2,
            "image_id": 3,
            "category_id": 2,
            "bbox": [0.5, 0, 3, 4],
            "area": 12,
            "iscrowd": 0,
        },
    ],
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}],
}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty data set root, and catalogs that forget what the test registers."""
    path = tmp_path / "root"
    path.mkdir()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(path))
    monkeypatch.setattr(folders, "_folders", {})
    catalogs = (DatasetCatalog, MetadataCatalog)
    before = [dict(catalog.data) for catalog in catalogs]
    yield path
    for catalog, data in zip(catalogs, before, strict=True):
        catalog.data.clear()
        catalog.data.update(data)


def write(
    root: Path, content: Any = COCO, *, name: str = "pets", split: str = "train", at: str = "images"
) -> Path:
    """Writes a json, and an empty file for each of its images; returns the json's path."""
    json_file = root / name / f"{split}.json"
    images = root / name / at
    images.mkdir(parents=True, exist_ok=True)
    json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    if isinstance(content, dict):
        for image in content.get("images") or []:
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                (images / image["file_name"]).touch()
    return json_file


def message_of(call: Callable[[], Any]) -> str:
    """The one line that a call fails with."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_root_is_detectron2s(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    assert dataset_root() == root
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_root() == Path("datasets")


def test_every_json_of_two_levels_is_registered_unread(root: Path) -> None:
    write(root, "no json at all", name="pets", split="train")
    write(root, name="my_pets", split="val_2")
    write(root, name=".trash")
    write(root, split=".hidden")
    write(root, name="pets/deeper")
    (root / "loose.json").write_text("{}")
    (root / "pets" / "folder.json").mkdir()

    assert register_folder_datasets() == ["my_pets_val_2", "pets_train"]
    metadata = MetadataCatalog.get("my_pets_val_2")
    assert metadata.json_file == str(root / "my_pets" / "val_2.json")
    assert metadata.image_root == str(root / "my_pets" / "images")
    assert metadata.evaluator_type == "coco"
    assert "thing_classes" not in metadata.as_dict()


def test_a_root_that_does_not_exist_holds_nothing(root: Path) -> None:
    assert register_folder_datasets(root / "absent") == []


def test_a_relative_root_survives_a_change_of_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root)
    monkeypatch.chdir(root.parent)
    register_folder_datasets(Path("root"))
    monkeypatch.chdir("/")
    assert len(require_dataset("pets_train")) == 2


def test_a_loaded_data_set_is_in_detectron2s_format(root: Path) -> None:
    write(root)
    records = require_dataset("pets_train", training=True)

    assert [record["image_id"] for record in records] == [3, 5]
    assert [Path(record["file_name"]).name for record in records] == ["a.png", "b.png"]
    assert (records[1]["height"], records[1]["width"]) == (40, 50)
    assert class_names("pets_train") == ["cat", "dog"]
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 7: 1}


def test_whole_numbers_are_not_truncated_by_resizing(root: Path) -> None:
    write(root)
    annotation = require_dataset("pets_train")[1]["annotations"][0]
    half = T.TransformList([T.ResizeTransform(40, 50, 20, 25)])
    resized = transform_instance_annotations(annotation, half, (20, 25))
    assert resized["bbox"].tolist() == [0.5, 1.0, 6.0, 7.5]
    assert np.concatenate(resized["segmentation"]).tolist() == [0.5, 1, 6, 1, 6, 7.5, 0.5, 7.5]


def test_images_may_lie_in_a_folder_named_after_the_split(root: Path) -> None:
    write(root, at="train")
    assert Path(require_dataset("pets_train")[0]["file_name"]) == root / "pets" / "train" / "a.png"


def test_the_folder_named_after_the_split_is_preferred(root: Path) -> None:
    write(root, at="train")
    write(root, split="val", at="images")
    register_folder_datasets()
    assert MetadataCatalog.get("pets_train").image_root == str(root / "pets" / "train")
    assert MetadataCatalog.get("pets_val").image_root == str(root / "pets" / "images")


def test_registering_twice_changes_nothing(root: Path) -> None:
    write(root)
    register_folder_datasets()
    require_dataset("pets_train")
    before = MetadataCatalog.get("pets_train").as_dict()
    assert register_folder_datasets() == ["pets_train"]
    assert MetadataCatalog.get("pets_train").as_dict() == before


def test_a_changed_json_is_read_again(root: Path) -> None:
    json_file = write(root)
    held = MetadataCatalog.get("pets_train")
    assert class_names("pets_train") == ["cat", "dog"]

    changed = deepcopy(COCO)
    changed["categories"].append({"id": 9, "name": "hamster"})
    json_file.write_text(json.dumps(changed))
    assert class_names("pets_train") == ["cat", "dog", "hamster"]
    assert held.thing_classes == ["cat", "dog", "hamster"]

    changed["categories"][2]["name"] = "gerbil"
    json_file.write_text(json.dumps(changed))
    register_folder_datasets()
    assert "thing_classes" not in held.as_dict()
    DatasetCatalog.get("pets_train")  # as detectron2's loader does
    assert held.thing_classes == ["cat", "dog", "gerbil"]


def test_a_json_that_was_mended_after_a_failure_loads(root: Path) -> None:
    broken = deepcopy(COCO)
    broken["annotations"][0]["ignore"] = 1  # detectron2 asserts, after it has set the classes
    broken["categories"][0]["name"] = "hog"
    json_file = write(root, broken)
    assert "ignore" in message_of(lambda: require_dataset("pets_train"))
    json_file.write_text(json.dumps(COCO))
    require_dataset("pets_train")
    assert class_names("pets_train") == ["cat", "dog"]


def test_another_root_takes_over_its_names_and_leaves_the_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root)
    write(root, split="val")
    register_folder_datasets()
    assert class_names("pets_train") == ["cat", "dog"]

    other = deepcopy(COCO)
    other["categories"][0]["name"] = "wolf"
    write(tmp_path / "other", other)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "other"))
    assert register_folder_datasets() == ["pets_train"]
    assert class_names("pets_train") == ["cat", "wolf"]
    assert MetadataCatalog.get("pets_train").image_root.startswith(str(tmp_path / "other"))
    assert class_names("pets_val") == ["cat", "dog"]


def test_a_data_set_whose_json_is_gone_is_forgotten(root: Path) -> None:
    json_file = write(root)
    require_dataset("pets_train")
    json_file.unlink()
    assert "there is no file" in message_of(lambda: require_dataset("pets_train"))
    assert register_folder_datasets() == []
    assert "pets_train" not in DatasetCatalog
    assert "pets_train" not in MetadataCatalog


def test_names_that_others_registered_are_left_alone(root: Path) -> None:
    def loader() -> list[dict[str, Any]]:
        return []

    DatasetCatalog.register("pets_train", loader)
    builtin = DatasetCatalog["coco_2017_val"]
    write(root)
    write(root, name="coco", split="2017_val")
    assert register_folder_datasets() == []
    assert DatasetCatalog["pets_train"] is loader
    assert DatasetCatalog["coco_2017_val"] is builtin
    assert "json_file" not in MetadataCatalog.get("pets_train").as_dict()


def test_a_name_that_two_files_have_is_refused(root: Path) -> None:
    write(root, name="a", split="b_c")
    write(root, name="a_b", split="c")
    assert register_folder_datasets() == ["a_b_c"]
    message = message_of(lambda: require_dataset("a_b_c"))
    assert str(root / "a" / "b_c.json") in message
    assert str(root / "a_b" / "c.json") in message


def test_classes_that_the_user_set_are_not_overwritten(root: Path) -> None:
    write(root)
    register_folder_datasets()
    MetadataCatalog.get("pets_train").thing_classes = ["feline", "canine"]
    assert "feline" in message_of(lambda: require_dataset("pets_train"))


def with_keypoints(*names: str, **more: Any) -> dict[str, Any]:
    content = deepcopy(COCO)
    for category in content["categories"]:
        category.update(keypoints=list(names), **more)
    return content


def test_keypoint_metadata_comes_from_the_categories(root: Path) -> None:
    names = ("nose", "left_ear", "right_ear")
    write(root, with_keypoints(*names, skeleton=[[1, 2], [1, 3]]))
    require_dataset("pets_train")
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.keypoint_names == list(names)
    links = [(first, second) for first, second, _ in metadata.keypoint_connection_rules]
    assert links == [("nose", "left_ear"), ("nose", "right_ear")]
    assert all(0 <= part <= 255 for rule in metadata.keypoint_connection_rules for part in rule[2])
    assert create_keypoint_hflip_indices("pets_train") == [0, 2, 1]


@pytest.mark.parametrize("names", [("nose", "left_ear"), ("nose", "tail"), ("bright", "bleft")])
def test_a_flip_map_that_names_do_not_determine_is_left_out(
    root: Path, names: tuple[str, ...]
) -> None:
    write(root, with_keypoints(*names))
    require_dataset("pets_train")
    metadata = MetadataCatalog.get("pets_train").as_dict()
    assert metadata["keypoint_names"] == list(names)
    assert "keypoint_flip_map" not in metadata


def test_keypoints_that_differ_between_categories_are_left_out(root: Path) -> None:
    content = with_keypoints("nose")
    content["categories"][0]["keypoints"] = ["tail"]
    write(root, content)
    require_dataset("pets_train")
    assert "keypoint_names" not in MetadataCatalog.get("pets_train").as_dict()


def test_keypoint_metadata_follows_its_own_json_and_spares_the_users(root: Path) -> None:
    json_file = write(root, with_keypoints("left_ear", "right_ear"))
    write(root, with_keypoints("left_eye", "right_eye"), split="val")
    register_folder_datasets()
    mine = [("left_eye", "right_eye"), ("a", "b")]
    MetadataCatalog.get("pets_val").keypoint_flip_map = mine
    require_dataset("pets_train")
    require_dataset("pets_val")
    require_dataset("pets_val")
    assert MetadataCatalog.get("pets_train").keypoint_names == ["left_ear", "right_ear"]
    assert MetadataCatalog.get("pets_val").keypoint_names == ["left_eye", "right_eye"]
    assert MetadataCatalog.get("pets_val").keypoint_flip_map == mine

    json_file.write_text(json.dumps(COCO))
    require_dataset("pets_train")
    assert "keypoint_names" not in MetadataCatalog.get("pets_train").as_dict()
    assert MetadataCatalog.get("pets_val").keypoint_names == ["left_eye", "right_eye"]


# What users get to read.


def test_an_unknown_name_is_answered_with_the_near_ones(root: Path) -> None:
    write(root)
    message = message_of(lambda: require_dataset("pet_train"))
    assert message.startswith("data set 'pet_train' is not registered; did you mean 'pets_train'?")
    assert str(root) in message
    assert "DETECTRON2_DATASETS" in message
    assert "coco_2017_train" not in message
    assert "did you mean 'coco_2017_val'?" in message_of(lambda: require_dataset("coco_2017_vall"))
    assert message_of(lambda: class_names("pet_train")) == message
    assert "pet_train" not in MetadataCatalog


def test_an_unknown_name_in_an_empty_or_absent_root(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert f"'{root}' (DETECTRON2_DATASETS), which has none" in message_of(
        lambda: require_dataset("xyzzy")
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "absent"))
    assert "which does not exist" in message_of(lambda: require_dataset("xyzzy"))


def test_many_names_are_not_all_listed(root: Path) -> None:
    for index in range(30):
        write(root, split=f"{index:02d}")
    message = message_of(lambda: require_dataset("xyzzy"))
    assert "pets_00" in message
    assert "pets_29" not in message
    assert "(30 in all)" in message


def test_a_builtin_data_set_that_is_not_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    message = message_of(lambda: require_dataset("coco_2017_val"))
    assert "coco/annotations/instances_val2017.json" in message
    assert "DETECTRON2_DATASETS" in message
    assert "cityscapes" in message_of(lambda: require_dataset("cityscapes_fine_instance_seg_val"))


def at(path: str, value: Any) -> dict[str, Any]:
    """COCO with one value replaced ("annotations.0.bbox"), or taken out where it is Ellipsis."""
    content: Any = deepcopy(COCO)
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = content
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


BAD_JSON = [
    ("", "is no json"),
    ('{"images": [', "is no json"),
    ("[" * 100_000, "is no json"),
    ("\x00\x01", "is no json"),
    ([], "holds a list"),
    ("null", "holds a NoneType"),
    ({"a.png": {"regions": []}}, "no list 'images'"),
    *((at(section, ...), f"no list '{section}'") for section in COCO),
    *((at(section, {}), f"no list '{section}'") for section in COCO),
    (at("categories", []), "'categories' is empty"),
    (at("images.0", 3), "images[0] is a int"),
    (at("annotations.1", None), "annotations[1] is a NoneType"),
    *((at(f"images.1.{f}", ...), f"images[1] has no '{f}'") for f in COCO["images"][0]),
    *(
        (at(f"annotations.0.{f}", ...), f"annotations[0] has no '{f}'")
        for f in ("id", "image_id", "category_id", "bbox")
    ),
    (at("categories.0.name", ...), "categories[0] has no 'name'"),
    (at("annotations.1.image_id", 77), "annotations[1] (id 2) has the image_id 77"),
    (at("annotations.1.image_id", "5"), "image_id '5'"),
    (at("annotations.1.image_id", [5]), "image_id [5]"),
    (at("annotations.1.category_id", 1), "category_id 1, which is not in 'categories'"),
    (at("annotations.1.id", 1), "annotations[1] has the id 1 of an earlier entry"),
    (at("images.1.id", 5), "images[1] has the id 5 of an earlier entry"),
    (at("categories.1.id", 7), "categories[1] has the id 7 of an earlier entry"),
    (at("images.0.id", {}), "images[0] has the id {}"),
    (at("images.0.id", "five"), "partly numbers, partly text"),
    (at("images.0.file_name", 12), "file_name 12"),
    (at("images.0.height", "40"), "height '40'"),
    (at("images.0.width", 0), "width 0"),
    (at("categories.0.name", 3), "categories[0] (id 7) has the name 3"),
    (at("annotations.0.bbox", []), "annotations[0] (id 1) has the bbox []"),
    (at("annotations.0.bbox", [1, 2, 3, None]), "bbox [1, 2, 3, None]"),
    (at("annotations.0.bbox", [1, 2, 3, float("nan")]), "bbox [1, 2, 3, nan]"),
    (at("annotations.0.bbox", {"x": 1}), "bbox {'x': 1}"),
    # What detectron2 finds while converting.
    (at("annotations.0.ignore", 1), "ignore"),
    (at("annotations.0.segmentation", {"size": [4, 4]}), "could not be loaded"),
    (at("annotations.0.segmentation", [3, 4]), "could not be loaded"),
    (at("annotations.0.segmentation", [["a"] * 6]), "could not be loaded"),
    (at("annotations.0.keypoints", ["a"]), "could not be loaded"),
]


@pytest.mark.parametrize(("content", "says"), BAD_JSON)
def test_bad_json_gets_one_line(root: Path, content: Any, says: str) -> None:
    json_file = write(root, content)
    message = message_of(lambda: require_dataset("pets_train"))
    assert message.startswith("data set 'pets_train'")
    assert str(json_file) in message
    assert says in message
    assert len(message) < 600 + len(str(json_file))


@pytest.mark.parametrize("segmentation", [3, "text", None, [], {}, [[1, 2]]])
def test_odd_segmentations_do_not_crash(root: Path, segmentation: Any) -> None:
    write(root, at("annotations.0.segmentation", segmentation))
    try:
        require_dataset("pets_train")
    except UserError as error:
        assert "pets_train" in str(error)


def test_the_users_own_coco_json_gets_the_same_lines(root: Path) -> None:
    json_file = write(root, at("images.0.height", ...))
    register_coco_instances("mine", {}, str(json_file), str(root / "pets" / "images"))
    assert "images[0] has no 'height'" in message_of(lambda: require_dataset("mine"))


def test_a_json_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    json_file = write(root)

    def refuse(*args: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    register_folder_datasets()
    monkeypatch.setattr(Path, "open", refuse)
    message = message_of(lambda: require_dataset("pets_train"))
    assert f"'{json_file}' cannot be read: Permission denied" in message


def test_no_images(root: Path) -> None:
    json_file = write(root, {**COCO, "images": [], "annotations": []})
    message = message_of(lambda: require_dataset("pets_train"))
    assert message == f"data set 'pets_train' has no images ('{json_file}')"


def test_missing_images_are_counted(root: Path) -> None:
    write(root)
    (root / "pets" / "images" / "b.png").unlink()
    message = message_of(lambda: require_dataset("pets_train"))
    assert "1 of 2 images are missing, the first is 'b.png'" in message
    assert f"looked in '{root / 'pets' / 'images'}'" in message


def test_a_missing_folder_of_images_is_named(root: Path) -> None:
    write(root, at="pictures")
    message = message_of(lambda: require_dataset("pets_train"))
    assert "2 of 2 images are missing, the first is 'a.png'" in message
    assert f"there is no folder '{root / 'pets' / 'images'}'" in message


def test_a_file_name_with_a_folder_too_many(root: Path) -> None:
    json_file = write(root)
    json_file.write_text(json.dumps(at("images.1.file_name", "images/a.png")))
    message = message_of(lambda: require_dataset("pets_train"))
    assert f"but 'a.png' lies in '{root / 'pets' / 'images'}'" in message


def test_images_may_lie_in_subfolders_or_anywhere(root: Path, tmp_path: Path) -> None:
    json_file = write(root)
    (root / "pets" / "images" / "sub").mkdir()
    (root / "pets" / "images" / "sub" / "a.png").touch()
    elsewhere = tmp_path / "b.png"
    elsewhere.touch()
    content = at("images.1.file_name", "sub/a.png")
    content["images"][0]["file_name"] = str(elsewhere)
    json_file.write_text(json.dumps(content))
    names = [record["file_name"] for record in require_dataset("pets_train")]
    assert names == [str(root / "pets" / "images" / "sub" / "a.png"), str(elsewhere)]


def test_images_are_looked_up_by_listing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [{**COCO["images"][0], "id": i, "file_name": f"{i}.png"} for i in range(500)]
    write(root, {**COCO, "images": images})
    register_folder_datasets()
    asked = []
    real = os.stat

    def counted(path: Any, *args: Any, **more: Any) -> os.stat_result:
        asked.append(path)
        return real(path, *args, **more)

    monkeypatch.setattr(os, "stat", counted)
    assert len(require_dataset("pets_train")) == 500
    assert len(asked) < 50


@pytest.mark.parametrize(
    "content",
    [
        {**COCO, "annotations": []},
        {**COCO, "annotations": [{**COCO["annotations"][0], "iscrowd": 1}]},
        {**COCO, "annotations": [{**COCO["annotations"][0], "bbox": [3, 4, 0, 7]}]},
    ],
)
def test_nothing_to_train_on(root: Path, content: dict[str, Any]) -> None:
    write(root, content)
    message = message_of(lambda: require_dataset("pets_train", training=True))
    assert "nothing to train on" in message
    assert "2 images" in message
    assert len(require_dataset("pets_train")) == 2


def test_a_data_set_of_the_users_own(root: Path) -> None:
    image = root / "x.png"
    image.touch()
    record = {"file_name": str(image), "height": 3, "width": 4, "image_id": 0, "annotations": []}
    DatasetCatalog.register("own", lambda: [record])
    assert require_dataset("own") == [record]
    message = message_of(lambda: class_names("own"))
    assert "MetadataCatalog.get('own').thing_classes" in message
    MetadataCatalog.get("own").thing_classes = ["thing"]
    assert class_names("own") == ["thing"]

    image.unlink()
    assert "1 of 1 images are missing" in message_of(lambda: require_dataset("own"))


def test_a_data_set_of_the_users_own_that_fails(root: Path) -> None:
    def own() -> list[dict[str, Any]]:
        raise KeyError("height\nwidth")

    DatasetCatalog.register("own", own)
    message = message_of(lambda: require_dataset("own"))
    assert "'own' could not be loaded: KeyError" in message
    assert "test_folders.py, line" in message

    DatasetCatalog.register("none", lambda: None)
    assert "could not be loaded" in message_of(lambda: require_dataset("none"))
    DatasetCatalog.register("words", lambda: ["a", "b"])
    assert "holds a str" in message_of(lambda: require_dataset("words"))
    DatasetCatalog.register("empty", list)
    assert "has no images" in message_of(lambda: require_dataset("empty"))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_data_sets_load() -> None:
    names = register_folder_datasets(SHARED)
    assert {"fruits_nuts_train", "nuclei_train", "nuclei_val_rle"} <= set(names)
    assert class_names("fruits_nuts_train") == ["date", "fig", "hazelnut"]
    assert len(require_dataset("nuclei_train", training=True)) == 96
    assert len(require_dataset("nuclei_val_rle")) == 32
