"""DATA_CHECK before training and evaluation: strict, repair and off."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from pycocotools.coco import COCO

from mask_rcnn_plus import load_config
from mask_rcnn_plus.data import PolygonMapper, generate_shapes, register_folder_datasets
from mask_rcnn_plus.engine import Trainer, main
from mask_rcnn_plus.evaluation.metrics import accumulate, complete_ground_truth
from mask_rcnn_tools.check.before_run import check_data

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def damaged(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Copies the shapes, damages the jsons, and uses the copy as data sets; returns its folder."""

    def damage(change: Callable[[dict[str, Any]], None]) -> Path:
        folder = tmp_path / "damaged" / "shapes"
        shutil.copytree(shapes_root / "shapes", folder)
        for split in ("train", "val"):
            path = folder / f"{split}.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.parent))
        return folder

    return damage


def run(config: Path, *arguments: str) -> int:
    return main(
        ["--config-file", str(config), *arguments, "TEST.PREVIEW_IMAGES", "0"],
        check_data=check_data,
    )


def two_faults(content: dict[str, Any]) -> None:
    content["annotations"][0]["segmentation"] = {"size": [9, 9], "counts": [81]}
    content["annotations"][1]["bbox"] = [0, 0, float("nan"), 3]


def test_strict_refuses_errors_with_one_line(
    tiny_config: Path, damaged: Any, capsys: Capture
) -> None:
    damaged(two_faults)
    assert run(tiny_config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data set 'shapes_train'" in line
    assert "has 2 errors (1 rle-size, 1 box-nan)" in line
    assert "annotation 1 (annotations[0]) of image 1 'train_000000.png'" in line
    assert "`mask-rcnn-plus check-data shapes_train`" in line and "DATA_CHECK repair" in line


def test_repair_trains_and_evaluates_on_the_repaired_json(
    tiny_config: Path, tmp_path: Path, damaged: Any, capsys: Capture
) -> None:
    folder = damaged(two_faults)
    assert run(tiny_config, "DATA_CHECK", "repair") == 0
    screen = capsys.readouterr().out
    for split in ("train", "val"):
        repaired = tmp_path / "output" / "data_check" / f"shapes_{split}.json"
        original = json.loads((folder / f"{split}.json").read_text())
        content = json.loads(repaired.read_text())
        assert len(content["annotations"]) == len(original["annotations"]) - 1
        box = next(a["bbox"] for a in content["annotations"] if a["id"] == 2)
        assert np.isfinite(box).all() and min(box[2:]) > 0
        assert MetadataCatalog.get(f"shapes_{split}").json_file == str(repaired)
        assert str(repaired) in screen
    assert "repaired: 1 rle-size, 1 box-nan" in screen
    assert "ground truth" in screen

    # The next start uses the original json again.
    register_folder_datasets()
    assert MetadataCatalog.get("shapes_train").json_file == str(folder / "train.json")


def test_off_still_refuses_masks_that_crash_the_process(
    tiny_config: Path, damaged: Any, capsys: Capture
) -> None:
    damaged(two_faults)
    assert run(tiny_config, "DATA_CHECK", "off") == 2
    assert "[9, 9]" in capsys.readouterr().err


def test_off_accepts_harmless_errors(tiny_config: Path, damaged: Any) -> None:
    def wrong_area(content: dict[str, Any]) -> None:
        content["annotations"][0]["area"] = -1

    damaged(wrong_area)
    assert run(tiny_config) == 2
    assert run(tiny_config, "DATA_CHECK", "off", "SOLVER.MAX_ITER", "1") == 0


def test_an_invalid_value_is_refused(tiny_config: Path, capsys: Capture) -> None:
    assert run(tiny_config, "DATA_CHECK", "strikt") == 2
    error = capsys.readouterr().err
    assert "DATA_CHECK" in error and "'strikt'; did you mean 'strict'?" in error


def test_the_log_counts_warnings(tiny_config: Path, damaged: Any, capsys: Capture) -> None:
    def repeat(content: dict[str, Any]) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 10**6})

    damaged(repeat)
    assert run(tiny_config, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()") == 0
    out = capsys.readouterr().out
    assert "Data set 'shapes_train': 1 twin; `mask-rcnn-plus check-data shapes_train`" in out
    assert "anchors: best IoU" in out


def brush_masks(content: dict[str, Any]) -> None:
    """All objects but the first are crowds, as CVAT exports brush masks."""
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    for annotation in content["annotations"]:
        annotation["attributes"] = {"occluded": False}
    for annotation in content["annotations"][1:]:
        size = sizes[annotation["image_id"]]
        rle = mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
        counts = rle["counts"].decode()
        annotation.update(segmentation={"size": size, "counts": counts}, iscrowd=1)


def test_brush_masks_are_counted_before_the_run_and_repaired(
    tiny_config: Path, tmp_path: Path, damaged: Any, capsys: Capture
) -> None:
    folder = damaged(brush_masks)
    total = len(json.loads((folder / "train.json").read_text())["annotations"])
    assert run(tiny_config, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()") == 0
    out = capsys.readouterr().out
    text = f"{total - 1} of {total} annotations are not trained on; DATA_CHECK repair makes"
    assert text in out and out.index(text) < out.index("Starting training")
    repair = ("DATA_CHECK", "repair", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1")
    assert run(tiny_config, *repair) == 0
    repaired = tmp_path / "output" / "data_check" / "shapes_train.json"
    assert not any(a["iscrowd"] for a in json.loads(repaired.read_text())["annotations"])


def test_images_without_objects_are_counted(
    tiny_config: Path, damaged: Any, capsys: Capture
) -> None:
    def empty(content: dict[str, Any]) -> None:
        first = content["images"][0]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != first]

    damaged(empty)
    assert run(tiny_config, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()") == 0
    assert "1 of 4 images have no object and are not trained on" in capsys.readouterr().out


def test_evaluating_on_training_images_is_said(
    tiny_config: Path, damaged: Any, capsys: Capture
) -> None:
    folder = damaged(lambda content: None)
    shutil.copy(folder / "train.json", folder / "val.json")
    short = ("SOLVER.MAX_ITER", "1")
    assert run(tiny_config, *short) == 0
    out = capsys.readouterr().out
    assert "all images of shapes_val (4) are also in shapes_train" in out
    assert "in DATASETS.TRAIN and in DATASETS.TEST" not in out
    assert run(tiny_config, *short, "DATASETS.TEST", "('shapes_train',)") == 0
    assert "'shapes_train' is in DATASETS.TRAIN and in DATASETS.TEST" in capsys.readouterr().out


def test_missing_masks_do_not_matter_without_a_mask_head(tiny_config: Path, damaged: Any) -> None:
    def unmask(content: dict[str, Any]) -> None:
        del content["annotations"][0]["segmentation"]

    damaged(unmask)
    assert run(tiny_config, "DATASETS.TEST", "()") == 2
    boxes = ("MODEL.MASK_ON", "False", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()")
    assert run(tiny_config, *boxes) == 0


def test_a_data_set_registered_by_the_user_is_repaired_too(
    tiny_config: Path, tmp_path: Path, damaged: Any, capsys: Capture
) -> None:
    folder = damaged(two_faults)
    register_coco_instances("mine", {}, str(folder / "train.json"), str(folder / "images"))
    try:
        sets = ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()")
        assert run(tiny_config, *sets, "DATA_CHECK", "off") == 2
        assert "data set 'mine'" in capsys.readouterr().err
        assert run(tiny_config, *sets, "DATA_CHECK", "repair", "SOLVER.MAX_ITER", "1") == 0
        repaired = tmp_path / "output" / "data_check" / "mine.json"
        assert MetadataCatalog.get("mine").json_file == str(repaired)
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_a_users_data_set_with_other_names_and_null_crowds_is_repaired(
    tiny_config: Path, damaged: Any, capsys: Capture
) -> None:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["file_name"] = f"images/{image['file_name']}"
        for annotation in content["annotations"]:
            annotation["iscrowd"] = None

    folder = damaged(change)
    register_coco_instances("mine", {}, str(folder / "train.json"), str(folder / "images"))
    try:
        sets = ("DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1")
        assert run(tiny_config, *sets) == 2
        assert "4 of them have other names" in capsys.readouterr().err
        assert run(tiny_config, *sets, "DATA_CHECK", "repair") == 0
    finally:
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


@pytest.fixture
def rle_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set folder with shapes whose masks are run lengths."""
    root = tmp_path / "rle"
    generate_shapes(
        root, num_train=2, num_val=1, image_size=(64, 64), mask_format="rle", progress=False
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    register_folder_datasets()
    return root


def test_run_lengths_train_in_polygon_mode(tiny_config: Path, rle_root: Path) -> None:
    cfg = load_config(tiny_config, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    masks = next(iter(Trainer.build_train_loader(cfg)))[0]["instances"].gt_masks
    assert type(masks).__name__ == "PolygonMasks" and len(masks) > 0
    assert run(tiny_config, "SOLVER.MAX_ITER", "1") == 0


def test_run_lengths_become_polygons_of_the_same_mask(rle_root: Path) -> None:
    record = DatasetCatalog.get("shapes_train")[0]
    kept = json.dumps(record, default=str)
    mapped = PolygonMapper(lambda seen: seen)(record)
    assert json.dumps(record, default=str) == kept
    coco = COCO(str(rle_root / "shapes" / "train.json"))
    originals = coco.loadAnns(coco.getAnnIds([record["image_id"]]))
    for annotation, original in zip(mapped["annotations"], originals, strict=True):
        assert isinstance(annotation["segmentation"], list)
        again = coco.annToMask({**original, "segmentation": annotation["segmentation"]})
        assert (again == coco.annToMask(original)).all()


def test_a_detection_matches_an_annotation_with_the_id_0() -> None:
    truth = COCO()
    square = [[2.0, 2, 12, 2, 12, 12, 2, 12]]
    truth.dataset = {
        "images": [{"id": 1, "height": 20, "width": 20}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "iscrowd": 0,
             "area": 100.0, "segmentation": square}
        ],
    }  # fmt: skip
    truth.createIndex()
    detection = {"image_id": 1, "category_id": 1, "bbox": [2, 2, 10, 10], "score": 1.0}
    complete_ground_truth(truth)
    scores = accumulate(truth, [detection], "bbox", max_dets=(1, 10, 100))
    assert scores.eval["precision"][0, :, 0, 0, -1].min() > 0.999
