"""Keypoints: wrong settings are refused before the first step; objects without any train too."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mask_rcnn_plus import load_config
from mask_rcnn_plus.data import build_train_mapper, register_folder_datasets, require_dataset
from mask_rcnn_plus.data.drawing import KEYPOINTS
from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.checks import check_datasets
from mask_rcnn_plus.errors import UserError

Content = dict[str, Any]
Run = Callable[..., int]

SIX = ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "6", "TEST.KEYPOINT_OKS_SIGMAS", str([0.1] * 6))


@pytest.fixture
def run(
    tiny_config: Path, shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Trains on a copy of the shapes, changed by a function for each split."""

    def run(change: Callable[[Content, str], Any] = lambda *_: None, *arguments: str) -> int:
        folder = tmp_path / "changed" / "shapes"
        shutil.copytree(shapes_root / "shapes", folder)
        for split in ("train", "val"):
            path = folder / f"{split}.json"
            content = json.loads(path.read_text())
            change(content, split)
            path.write_text(json.dumps(content))
        monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.parent))
        keys = ["MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "TEST.PREVIEW_IMAGES", "0"]
        keys += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "DATASETS.SHAPES.ENABLED", "False"]
        return main(["--config-file", str(tiny_config), *keys, *arguments])

    return run


def refusal(capsys: pytest.CaptureFixture[str], code: int) -> str:
    captured = capsys.readouterr()
    assert code == 2 and captured.err.count("\n") == 1 and "iter:" not in captured.out
    return captured.err


def test_the_number_of_keypoints_and_the_sigmas_are_checked_first(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(capsys, run())
    assert "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is 17" in message and "set it to 6" in message
    shutil.rmtree(tmp_path / "changed")
    message = refusal(capsys, run(lambda *_: None, *SIX[:2]))
    assert "TEST.KEYPOINT_OKS_SIGMAS has 0 values" in message and "give 6 values" in message
    assert "'shapes_val'" in message
    shutil.rmtree(tmp_path / "changed")
    assert "'shapes_val'" in refusal(capsys, run(lambda *_: None, *SIX, SIX[2], "[0.1, 0.1]"))


def rename(content: Content, names: list[str]) -> None:
    for category in content["categories"]:
        category["keypoints"] = names


def test_names_without_sides_need_images_that_are_not_mirrored(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsided(content: Content, split: str) -> None:
        rename(content, list("abcdef"))

    message = refusal(capsys, run(unsided, *SIX))
    assert "a, b, c, d, e, f are not pairs" in message and "INPUT.RANDOM_FLIP none" in message
    shutil.rmtree(tmp_path / "changed")
    assert run(unsided, *SIX, "INPUT.RANDOM_FLIP", "none", "SOLVER.MAX_ITER", "1") == 0


def test_categories_without_names_of_keypoints(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def unnamed(content: Content, split: str) -> None:
        for category in content["categories"]:
            del category["keypoints"]

    message = refusal(capsys, run(unnamed, *SIX))
    assert "'shapes_train'" in message and "no list 'keypoints'" in message


def test_data_sets_must_name_the_same_keypoints(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(content: Content, split: str) -> None:
        if split == "val":
            rename(content, [*KEYPOINTS[1:], KEYPOINTS[0]])

    message = refusal(capsys, run(differ, *SIX))
    assert "keypoints differ" in message and "'shapes_val' has top, " in message


def two_skeletons(content: Content, split: str) -> None:
    content["categories"][0]["keypoints"] = ["wrist", "tip"]
    used = content["categories"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] != used]


def test_the_skeleton_of_an_unused_class_does_not_matter(run: Run) -> None:
    assert run(two_skeletons, *SIX, "SOLVER.MAX_ITER", "1") == 0


def test_different_skeletons_in_use_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(content: Content, split: str) -> None:
        first = content["categories"][0]
        first["keypoints"] = ["wrist", "tip"]
        for annotation in content["annotations"]:
            if annotation["category_id"] == first["id"]:
                annotation["keypoints"] = [1, 1, 2, 3, 3, 2]

    assert "objects with 2 and 6 keypoints" in refusal(capsys, run(differ, *SIX))


@pytest.mark.parametrize("without", [{}, {"keypoints": []}, {"keypoints": None}])
def test_objects_without_keypoints_train_as_objects_with_invisible_keypoints(
    run: Run, without: Content, tmp_path: Path, tiny_config: Path
) -> None:
    def strip(content: Content, split: str) -> None:
        # All objects of the first image, and the first object of the others.
        seen: set[int] = set()
        first = content["images"][0]["id"]
        for annotation in content["annotations"]:
            if annotation["image_id"] in {first} | ({annotation["image_id"]} - seen):
                for key in ("keypoints", "num_keypoints"):
                    del annotation[key]
                annotation.update(without)
            seen.add(annotation["image_id"])

    # MIN_KEYPOINTS_PER_IMAGE 0 keeps the image without keypoints.
    keep = ("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", "0")
    assert run(strip, *SIX, *keep) == 0
    register_folder_datasets()
    records = require_dataset("shapes_train")
    options = ["MODEL.KEYPOINT_ON", "True", "MODEL.MASK_ON", "False", *SIX]
    mapper = build_train_mapper(load_config(tiny_config, options))
    for index in (0, 1):
        points = mapper(records[index])["instances"].gt_keypoints.tensor
        assert len(points) == len(records[index]["annotations"])
        assert points[0].abs().sum() == 0 and points[1:].any() == bool(index)


@pytest.mark.parametrize("value", ["0", 2])
def test_a_crowd_flag_without_meaning_is_refused_in_any_data_set(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    def flag(content: Content, split: str) -> None:
        content["annotations"][0]["iscrowd"] = value

    assert f"iscrowd {value!r}" in refusal(capsys, run(flag, *SIX))
    folder = tmp_path / "changed" / "shapes"
    register_coco_instances("mine", {}, str(folder / "train.json"), str(folder / "images"))
    try:
        with pytest.raises(UserError, match=f"1 annotations .* {value!r}"):
            args = argparse.Namespace(eval_only=False)
            sets = ["DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()"]
            check_datasets(load_config(tmp_path / "tiny.yaml", sets), args)
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")
