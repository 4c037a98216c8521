"""Data sets by folder: which are registered, and when they are read again."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
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

SHARED = Path(__file__).parents[3] / "shared" / "data"

# A fixture that is a function, see conftest.py.
Fixture = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("root")


def test_the_root_is_the_same_as_in_detectron2(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    assert dataset_root() == root
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_root() == Path("datasets")


def test_every_json_two_levels_down_is_registered_without_reading_it(
    root: Path, write: Fixture
) -> None:
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


def test_a_missing_root_has_no_data_sets(root: Path) -> None:
    assert register_folder_datasets(root / "absent") == []


def test_a_relative_root_survives_a_change_of_directory(
    root: Path, monkeypatch: pytest.MonkeyPatch, write: Fixture
) -> None:
    write(root)
    monkeypatch.chdir(root.parent)
    register_folder_datasets(Path("root"))
    monkeypatch.chdir("/")
    assert len(require_dataset("pets_train")) == 2


def test_a_loaded_data_set_is_in_detectron2s_format(root: Path, write: Fixture) -> None:
    write(root)
    records = require_dataset("pets_train", training=True)

    assert [record["image_id"] for record in records] == [3, 5]
    assert [Path(record["file_name"]).name for record in records] == ["a.png", "b.png"]
    assert (records[1]["height"], records[1]["width"]) == (40, 50)
    assert class_names("pets_train") == ["cat", "dog"]
    assert [r["annotations"][0]["category_id"] for r in records] == [0, 1]
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.thing_dataset_id_to_contiguous_id == {2: 0, 7: 1}


def test_integers_are_not_truncated_by_resizing(root: Path, write: Fixture) -> None:
    write(root)
    annotation = require_dataset("pets_train")[1]["annotations"][0]
    half = T.TransformList([T.ResizeTransform(40, 50, 20, 25)])
    resized = transform_instance_annotations(annotation, half, (20, 25))
    assert resized["bbox"].tolist() == [0.5, 1.0, 6.0, 7.5]
    assert np.concatenate(resized["segmentation"]).tolist() == [0.5, 1, 6, 1, 6, 7.5, 0.5, 7.5]


def test_images_may_be_in_a_folder_named_after_the_split(root: Path, write: Fixture) -> None:
    write(root, at="train")
    assert Path(require_dataset("pets_train")[0]["file_name"]) == root / "pets" / "train" / "a.png"


def test_the_folder_named_after_the_split_is_preferred(root: Path, write: Fixture) -> None:
    write(root, at="train")
    write(root, split="val", at="images")
    register_folder_datasets()
    assert MetadataCatalog.get("pets_train").image_root == str(root / "pets" / "train")
    assert MetadataCatalog.get("pets_val").image_root == str(root / "pets" / "images")


def test_registering_twice_changes_nothing(root: Path, write: Fixture) -> None:
    write(root)
    register_folder_datasets()
    require_dataset("pets_train")
    before = MetadataCatalog.get("pets_train").as_dict()
    assert register_folder_datasets() == ["pets_train"]
    assert MetadataCatalog.get("pets_train").as_dict() == before


def test_a_changed_json_is_read_again(root: Path, write: Fixture, pets: Fixture) -> None:
    json_file = write(root)
    held = MetadataCatalog.get("pets_train")
    assert class_names("pets_train") == ["cat", "dog"]

    changed = pets()
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


def test_a_json_that_was_corrected_after_a_failure_loads(
    root: Path, write: Fixture, pets: Fixture, message_of: Fixture
) -> None:
    broken = pets()
    broken["annotations"][0]["ignore"] = 1  # detectron2 asserts, after it has set the classes
    broken["categories"][0]["name"] = "hog"
    json_file = write(root, broken)
    assert "ignore" in message_of(lambda: require_dataset("pets_train"))
    json_file.write_text(json.dumps(pets()))
    require_dataset("pets_train")
    assert class_names("pets_train") == ["cat", "dog"]


def test_another_root_takes_over_its_names_and_keeps_the_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Fixture, pets: Fixture
) -> None:
    write(root)
    write(root, split="val")
    register_folder_datasets()
    assert class_names("pets_train") == ["cat", "dog"]

    other = pets()
    other["categories"][0]["name"] = "wolf"
    write(tmp_path / "other", other)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "other"))
    assert register_folder_datasets() == ["pets_train"]
    assert class_names("pets_train") == ["cat", "wolf"]
    assert MetadataCatalog.get("pets_train").image_root.startswith(str(tmp_path / "other"))
    assert class_names("pets_val") == ["cat", "dog"]


def test_a_data_set_without_its_json_is_removed(
    root: Path, write: Fixture, message_of: Fixture
) -> None:
    json_file = write(root)
    require_dataset("pets_train")
    json_file.unlink()
    assert "there is no file" in message_of(lambda: require_dataset("pets_train"))
    assert register_folder_datasets() == []
    assert "pets_train" not in DatasetCatalog
    assert "pets_train" not in MetadataCatalog


def test_names_registered_by_others_are_not_changed(
    root: Path, write: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    def loader() -> list[dict[str, Any]]:
        return []

    DatasetCatalog.register("pets_train", loader)
    builtin = DatasetCatalog["coco_2017_val"]
    write(root)
    write(root, name="coco", split="2017_val")
    for _ in range(2):
        assert register_folder_datasets() == []
    assert caplog.text.count("'pets_train' is registered already") == 1
    assert DatasetCatalog["pets_train"] is loader
    assert DatasetCatalog["coco_2017_val"] is builtin
    assert "json_file" not in MetadataCatalog.get("pets_train").as_dict()


def test_a_name_of_two_files_is_refused(root: Path, write: Fixture, message_of: Fixture) -> None:
    write(root, name="a", split="b_c")
    write(root, name="a_b", split="c")
    assert register_folder_datasets() == ["a_b_c"]
    message = message_of(lambda: require_dataset("a_b_c"))
    assert str(root / "a" / "b_c.json") in message
    assert str(root / "a_b" / "c.json") in message


def test_classes_set_by_the_user_are_not_overwritten(
    root: Path, write: Fixture, message_of: Fixture
) -> None:
    write(root)
    register_folder_datasets()
    MetadataCatalog.get("pets_train").thing_classes = ["feline", "canine"]
    assert "feline" in message_of(lambda: require_dataset("pets_train"))


@pytest.mark.parametrize("value", [None, False, 0.0, 0])
def test_a_crowd_flag_of_other_types_is_taken_as_0(
    root: Path, write: Fixture, pets: Fixture, value: Any
) -> None:
    content = pets()
    content["annotations"][0]["iscrowd"] = value
    content["annotations"][1]["iscrowd"] = True
    write(root, content)
    # detectron2 leaves out what is not equal to 0.
    cat, dog = [r["annotations"][0]["iscrowd"] for r in require_dataset("pets_train")]
    assert (cat, dog) == (1, 0) and type(dog) is int


def with_keypoints(content: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
    for category in content["categories"]:
        category.update(keypoints=list(names), **more)
    return content


def test_keypoint_metadata_comes_from_the_categories(
    root: Path, write: Fixture, pets: Fixture
) -> None:
    names = ("nose", "left_ear", "right_ear")
    write(root, with_keypoints(pets(), *names, skeleton=[[1, 2], [1, 3]]))
    require_dataset("pets_train")
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.keypoint_names == list(names)
    links = [(first, second) for first, second, _ in metadata.keypoint_connection_rules]
    assert links == [("nose", "left_ear"), ("nose", "right_ear")]
    assert all(0 <= part <= 255 for rule in metadata.keypoint_connection_rules for part in rule[2])
    assert create_keypoint_hflip_indices("pets_train") == [0, 2, 1]


@pytest.mark.parametrize("names", [("nose", "left_ear"), ("nose", "tail"), ("bright", "bleft")])
def test_no_flip_map_is_set_if_the_names_do_not_determine_it(
    root: Path, names: tuple[str, ...], write: Fixture, pets: Fixture
) -> None:
    write(root, with_keypoints(pets(), *names))
    require_dataset("pets_train")
    metadata = MetadataCatalog.get("pets_train").as_dict()
    assert metadata["keypoint_names"] == list(names)
    assert "keypoint_flip_map" not in metadata


@pytest.mark.parametrize("skeleton", [5, "x", [[1]], [[1, 9]], [["a", "b"]], [None]])
def test_a_skeleton_without_meaning_is_not_set(
    root: Path, write: Fixture, pets: Fixture, skeleton: Any
) -> None:
    write(root, with_keypoints(pets(), "left", "left", "right", skeleton=skeleton))
    require_dataset("pets_train")
    metadata = MetadataCatalog.get("pets_train").as_dict()
    assert metadata["keypoint_names"] == ["left", "left", "right"]
    # Which "left" swaps with "right" is unknown, too.
    assert not metadata.keys() & {"keypoint_connection_rules", "keypoint_flip_map"}


def test_keypoints_that_differ_between_categories_are_not_set(
    root: Path, write: Fixture, pets: Fixture
) -> None:
    content = with_keypoints(pets(), "nose")
    content["categories"][0]["keypoints"] = ["tail"]
    write(root, content)
    require_dataset("pets_train")
    assert "keypoint_names" not in MetadataCatalog.get("pets_train").as_dict()


def test_keypoint_metadata_follows_the_json_and_keeps_the_users_values(
    root: Path, write: Fixture, pets: Fixture
) -> None:
    json_file = write(root, with_keypoints(pets(), "left_ear", "right_ear"))
    write(root, with_keypoints(pets(), "left_eye", "right_eye"), split="val")
    register_folder_datasets()
    mine = [("left_eye", "right_eye"), ("a", "b")]
    MetadataCatalog.get("pets_val").keypoint_flip_map = mine
    require_dataset("pets_train")
    require_dataset("pets_val")
    require_dataset("pets_val")
    assert MetadataCatalog.get("pets_train").keypoint_names == ["left_ear", "right_ear"]
    assert MetadataCatalog.get("pets_val").keypoint_names == ["left_eye", "right_eye"]
    assert MetadataCatalog.get("pets_val").keypoint_flip_map == mine

    json_file.write_text(json.dumps(pets()))
    require_dataset("pets_train")
    assert "keypoint_names" not in MetadataCatalog.get("pets_train").as_dict()
    assert MetadataCatalog.get("pets_val").keypoint_names == ["left_eye", "right_eye"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data sets are not here")
def test_real_data_sets_load() -> None:
    names = register_folder_datasets(SHARED)
    assert {"fruits_nuts_train", "nuclei_train", "nuclei_val_rle"} <= set(names)
    assert class_names("fruits_nuts_train") == ["date", "fig", "hazelnut"]
    assert len(require_dataset("nuclei_train", training=True)) == 96
    assert len(require_dataset("nuclei_val_rle")) == 32


@pytest.mark.slow
def test_the_import_reads_no_folder_and_the_catalogs_find_data_sets_when_asked(
    root: Path, write: Fixture
) -> None:
    for split in ("train", "val"):
        write(root, split=split)
    script = f"""
import sys

root, reads = {str(root)!r}, []

def note(event, args):
    if args and isinstance(args[0], str) and args[0].startswith(root):
        reads.append((event, args[0]))

sys.addaudithook(note)
import mask_rcnn_plus
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

assert not reads, reads
assert callable(DatasetCatalog["pets_train"])
assert len(DatasetCatalog.get("pets_train")) == 2
assert reads
assert MetadataCatalog.get("pets_val").evaluator_type == "coco"
assert MetadataCatalog.get("coco_2017_val").evaluator_type == "coco"
assert MetadataCatalog.get("anything").as_dict() == {{"name": "anything"}}
try:
    DatasetCatalog.get("pets_test")
except KeyError as error:
    assert "pets_test" in str(error) and "pets_val" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_metadata_is_there_before_the_data_set_is_loaded(root: Path, write: Fixture) -> None:
    json_file = write(root)
    assert MetadataCatalog.get("pets_train").json_file == str(json_file)
    assert DatasetCatalog.get("pets_train")


def test_a_name_that_the_user_registered_first_stays_the_users(root: Path, write: Fixture) -> None:
    write(root)
    DatasetCatalog.register("pets_train", lambda: [{"file_name": "mine"}])
    assert DatasetCatalog.get("pets_train") == [{"file_name": "mine"}]
    assert MetadataCatalog.get("pets_train").get("json_file") is None


@pytest.mark.parametrize("loaded", [False, True], ids=["known", "loaded"])
def test_a_registration_by_the_user_replaces_a_data_set_by_folder(
    root: Path, write: Fixture, loaded: bool
) -> None:
    for name in ("pets", "cars"):
        write(root, name=name)
    if loaded:
        require_dataset("pets_train")
    # As the balloon notebook; asking for any unknown name has registered the folders before.
    MetadataCatalog.get("unknown")
    MetadataCatalog.get("pets_train").set(colour="red")
    DatasetCatalog.register("pets_train", lambda: [{"file_name": "mine"}])
    metadata = MetadataCatalog.get("pets_train").set(thing_classes=["balloon"])
    assert metadata.as_dict() == {
        "name": "pets_train",
        "colour": "red",
        "thing_classes": ["balloon"],
    }
    assert DatasetCatalog.get("pets_train") == [{"file_name": "mine"}]
    assert register_folder_datasets() == ["cars_train"]
    with pytest.raises(AssertionError, match="already registered"):
        DatasetCatalog.register("pets_train", list)


def test_detectron2s_own_registration_replaces_a_data_set_by_folder(
    root: Path, write: Fixture, pets: Fixture
) -> None:
    json_file = write(root)
    write(root, name="other", at="elsewhere")
    require_dataset("pets_train")
    register_coco_instances(
        *("pets_train", {"colour": "red"}, str(root / "other" / "train.json")),
        str(root / "other" / "elsewhere"),
    )
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.json_file != str(json_file) and metadata.evaluator_type == "coco"
    (_, record) = DatasetCatalog.get("pets_train")
    assert Path(record["file_name"]).parent == root / "other" / "elsewhere"
    # The same again after the user has removed it: the folder is found again.
    DatasetCatalog.remove("pets_train")
    MetadataCatalog.remove("pets_train")
    assert MetadataCatalog.get("pets_train").json_file == str(json_file)


def test_catalogs_are_extended_once() -> None:
    catalog = type(DatasetCatalog)
    before = catalog.get, catalog.register, type(MetadataCatalog).get
    folders.extend_catalogs()
    assert (catalog.get, catalog.register, type(MetadataCatalog).get) == before


def test_a_folder_that_may_not_be_entered_is_skipped(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def refuse(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("closed/train.json"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    for name in ("closed", "open"):
        (root / name).mkdir()
        (root / name / "train.json").write_text("{}")
    monkeypatch.setattr(os, "stat", refuse)
    assert register_folder_datasets() == ["open_train"]
