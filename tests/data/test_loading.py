"""The messages about a data set that cannot be used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mask_rcnn_plus.data import (
    class_names,
    register_folder_datasets,
    require_dataset,
)
from mask_rcnn_plus.errors import UserError

# A fixture that is a function, see conftest.py.
Fixture = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("root")


def test_the_message_of_an_unknown_name_suggests_a_similar_one(
    root: Path, write: Fixture, message_of: Fixture
) -> None:
    write(root)
    message = message_of(lambda: require_dataset("pet_train"))
    assert message.startswith("data set 'pet_train' is not registered; did you mean 'pets_train'?")
    assert str(root) in message
    assert "DETECTRON2_DATASETS" in message
    assert "coco_2017_train" not in message
    assert "did you mean 'coco_2017_val'?" in message_of(lambda: require_dataset("coco_2017_vall"))
    assert message_of(lambda: class_names("pet_train")) == message
    assert "pet_train" not in MetadataCatalog


def test_an_unknown_name_in_an_empty_or_missing_root(
    root: Path, monkeypatch: pytest.MonkeyPatch, message_of: Fixture
) -> None:
    assert f"'{root}' (DETECTRON2_DATASETS), which has no data sets" in message_of(
        lambda: require_dataset("xyzzy")
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root / "absent"))
    assert "which does not exist" in message_of(lambda: require_dataset("xyzzy"))


def test_many_names_are_not_all_listed(root: Path, write: Fixture, message_of: Fixture) -> None:
    for index in range(30):
        write(root, split=f"{index:02d}")
    message = message_of(lambda: require_dataset("xyzzy"))
    assert "pets_00" in message
    assert "pets_29" not in message
    assert "(30 in all)" in message


def test_a_builtin_data_set_that_is_not_on_disk(
    monkeypatch: pytest.MonkeyPatch, message_of: Fixture
) -> None:
    message = message_of(lambda: require_dataset("coco_2017_val"))
    assert "coco/annotations/instances_val2017.json" in message
    assert "DETECTRON2_DATASETS" in message
    assert "cityscapes" in message_of(lambda: require_dataset("cityscapes_fine_instance_seg_val"))


def at(path: str, value: Any) -> Callable[[Any], Any]:
    """Replaces one value of the content ("annotations.0.bbox"), or removes it for Ellipsis."""

    def change(content: Any) -> Any:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        place = content
        for key in parents:
            place = place[key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
        return content

    return change


BAD_JSON: list[tuple[Any, str]] = [
    ("", "is not valid json"),
    ('{"images": [', "is not valid json"),
    ("[" * 100_000, "is not valid json"),
    ("\x00\x01", "is not valid json"),
    ([], "contains a list"),
    ("null", "contains a NoneType"),
    ({"a.png": {"regions": []}}, "'images' is missing"),
    *(
        (at(section, ...), f"'{section}' is missing")
        for section in ("images", "annotations", "categories")
    ),
    *(
        (at(section, {}), f"'{section}' is missing")
        for section in ("images", "annotations", "categories")
    ),
    (at("categories", []), "'categories' is empty"),
    (at("images.0", 3), "images[0] is a int"),
    (at("annotations.1", None), "annotations[1] is a NoneType"),
    *(
        (at(f"images.1.{f}", ...), f"images[1] lacks '{f}'")
        for f in ("id", "file_name", "height", "width")
    ),
    *(
        (at(f"annotations.0.{f}", ...), f"annotations[0] lacks '{f}'")
        for f in ("id", "image_id", "category_id", "bbox")
    ),
    (at("categories.0.name", ...), "categories[0] lacks 'name'"),
    (at("annotations.1.image_id", 77), "annotations[1] (id 2) has the image_id 77"),
    (at("annotations.1.image_id", "5"), "image_id '5'"),
    (at("annotations.1.image_id", [5]), "image_id [5]"),
    (at("annotations.1.category_id", 1), "category_id 1, which is not in 'categories'"),
    (at("annotations.1.id", 1), "annotations[1] repeats the id 1 of an earlier entry"),
    (at("images.1.id", 5), "images[1] repeats the id 5 of an earlier entry"),
    (at("categories.1.id", 7), "categories[1] repeats the id 7 of an earlier entry"),
    (at("images.0.id", {}), "images[0] has the id {}"),
    (at("images.0.id", "five"), "partly numbers and partly strings"),
    (at("images.0.file_name", 12), "file_name 12"),
    (at("images.0.height", "40"), "height '40'"),
    (at("images.0.width", 0), "width 0"),
    (at("categories.0.name", 3), "categories[0] (id 7) has the name 3"),
    (at("annotations.0.bbox", []), "annotations[0] (id 1) has the bbox []"),
    (at("annotations.0.bbox", [1, 2, 3, None]), "bbox [1, 2, 3, None]"),
    (at("annotations.0.bbox", [1, 2, 3, float("nan")]), "bbox [1, 2, 3, nan]"),
    (at("annotations.0.bbox", {"x": 1}), "bbox {'x': 1}"),
    # detectron2 notices these while converting.
    (at("annotations.0.ignore", 1), "ignore"),
    (at("annotations.0.segmentation", {"size": [4, 4]}), "RLE of the size [4, 4]"),
    (at("annotations.0.segmentation", [3, 4]), "has the polygon 3, which is not a list of numbers"),
    (at("annotations.0.segmentation", [["a"] * 6]), "has the polygon ['a', "),
    (at("annotations.0.segmentation", [["nan"] * 6]), "which is not a list of numbers"),
    (at("annotations.0.segmentation", [[1, 2, 3, 4, 5, float("nan")]]), "not finite"),
    (at("annotations.0.segmentation", [[1, 2, 3, 4, 5, 10**400]]), "not finite"),
    (at("annotations.0.segmentation", [[1, 2, 3, 4, 5, -1e9]]), "the coordinate -1e+09"),
    (at("annotations.0.segmentation", [[0, 0, 9e5, 9e5] * 20]), "pixels long"),
    (at("annotations.0.segmentation", "text"), "neither polygons nor an RLE"),
    (at("annotations.0.bbox", [1, 2, 3, 10**400]), "not [x, y, width, height]"),
    (at("images.0.height", 10**8), "(INPUT.MAX_PIXELS, --max-pixels)"),
    (at("annotations.0.keypoints", ["a"]), "could not be loaded"),
]


@pytest.mark.parametrize(("content", "says"), BAD_JSON)
def test_a_bad_json_is_refused_in_one_line(
    root: Path, content: Any, says: str, write: Fixture, pets: Fixture, message_of: Fixture
) -> None:
    json_file = write(root, content(pets()) if callable(content) else content)
    message = message_of(lambda: require_dataset("pets_train"))
    assert message.startswith("data set 'pets_train'")
    assert str(json_file) in message
    assert says in message
    assert len(message) < 600 + len(str(json_file))


@pytest.mark.parametrize("segmentation", [3, "text", None, [], {}, [[1, 2]]])
def test_odd_segmentations_do_not_crash(
    root: Path, segmentation: Any, write: Fixture, pets: Fixture
) -> None:
    write(root, at("annotations.0.segmentation", segmentation)(pets()))
    try:
        require_dataset("pets_train")
    except UserError as error:
        assert "pets_train" in str(error)


def test_a_coco_json_registered_by_the_user_gets_the_same_messages(
    root: Path, write: Fixture, pets: Fixture, message_of: Fixture
) -> None:
    json_file = write(root, at("images.0.height", ...)(pets()))
    register_coco_instances("mine", {}, str(json_file), str(root / "pets" / "images"))
    assert "images[0] lacks 'height'" in message_of(lambda: require_dataset("mine"))


def test_an_unreadable_json(
    root: Path, monkeypatch: pytest.MonkeyPatch, write: Fixture, message_of: Fixture
) -> None:
    json_file = write(root)

    def refuse(*args: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    register_folder_datasets()
    monkeypatch.setattr(Path, "open", refuse)
    message = message_of(lambda: require_dataset("pets_train"))
    assert f"'{json_file}' cannot be read: Permission denied" in message


def test_no_images(root: Path, write: Fixture, pets: Fixture, message_of: Fixture) -> None:
    json_file = write(root, {**pets(), "images": [], "annotations": []})
    message = message_of(lambda: require_dataset("pets_train"))
    assert message == f"data set 'pets_train' has no images ('{json_file}')"


def test_missing_images_are_counted(root: Path, write: Fixture, message_of: Fixture) -> None:
    write(root)
    (root / "pets" / "images" / "b.png").unlink()
    message = message_of(lambda: require_dataset("pets_train"))
    assert "1 of 2 images are missing, the first is 'b.png'" in message
    assert f"looked in '{root / 'pets' / 'images'}'" in message


def test_a_missing_folder_of_images_is_named(
    root: Path, write: Fixture, message_of: Fixture
) -> None:
    write(root, at="pictures")
    message = message_of(lambda: require_dataset("pets_train"))
    assert "2 of 2 images are missing, the first is 'a.png'" in message
    assert f"there is no folder '{root / 'pets' / 'images'}'" in message


def test_a_file_name_with_an_additional_folder(
    root: Path, write: Fixture, pets: Fixture, message_of: Fixture
) -> None:
    json_file = write(root)
    json_file.write_text(json.dumps(at("images.1.file_name", "images/a.png")(pets())))
    message = message_of(lambda: require_dataset("pets_train"))
    assert f"but 'a.png' is in '{root / 'pets' / 'images'}'" in message


def test_images_may_be_in_subfolders_or_anywhere(
    root: Path, tmp_path: Path, write: Fixture, pets: Fixture
) -> None:
    json_file = write(root)
    (root / "pets" / "images" / "sub").mkdir()
    (root / "pets" / "images" / "sub" / "a.png").touch()
    elsewhere = tmp_path / "b.png"
    elsewhere.touch()
    content = at("images.1.file_name", "sub/a.png")(pets())
    content["images"][0]["file_name"] = str(elsewhere)
    json_file.write_text(json.dumps(content))
    names = [record["file_name"] for record in require_dataset("pets_train")]
    assert names == [str(root / "pets" / "images" / "sub" / "a.png"), str(elsewhere)]


def test_images_are_looked_up_by_listing(
    root: Path, monkeypatch: pytest.MonkeyPatch, write: Fixture, pets: Fixture
) -> None:
    images = [{**pets()["images"][0], "id": i, "file_name": f"{i}.png"} for i in range(500)]
    write(root, {**pets(), "images": images})
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
    "change",
    [
        at("annotations", []),
        at("annotations.0.iscrowd", 1),
        at("annotations.0.bbox", [3, 4, 0, 7]),
    ],
)
def test_nothing_to_train_on(
    root: Path, change: Callable[[Any], Any], write: Fixture, pets: Fixture, message_of: Fixture
) -> None:
    content = pets()
    del content["annotations"][1]
    write(root, change(content))
    message = message_of(lambda: require_dataset("pets_train", training=True))
    assert "nothing to train on" in message
    assert "2 images" in message
    assert len(require_dataset("pets_train")) == 2


def test_a_data_set_of_the_users_own(root: Path, message_of: Fixture) -> None:
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


def test_a_failing_data_set_of_the_users_own(root: Path, message_of: Fixture) -> None:
    def own() -> list[dict[str, Any]]:
        raise KeyError("height\nwidth")

    DatasetCatalog.register("own", own)
    message = message_of(lambda: require_dataset("own"))
    assert "'own' could not be loaded: KeyError" in message
    assert "test_loading.py, line" in message

    DatasetCatalog.register("none", lambda: None)
    assert "could not be loaded" in message_of(lambda: require_dataset("none"))
    DatasetCatalog.register("words", lambda: ["a", "b"])
    assert "contains a str" in message_of(lambda: require_dataset("words"))
    DatasetCatalog.register("empty", list)
    assert "has no images" in message_of(lambda: require_dataset("empty"))
