"""Programs on top of detectron2 work with the plugin: docs/clients.md, and the balloon notebook."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.export import TracingAdapter
from detectron2.structures import BoxMode
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count_table
from detectron2.utils.visualizer import ColorMode, Visualizer

from mask_rcnn_plus.data import folders
from tests.modeling import models

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/clients.md").read_text()

pytestmark = pytest.mark.slow


def snippets(title: str) -> list[str]:
    """The Python code in a section of the page."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the page names; the model is hardly trained."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "balloons").symlink_to(trained)
    photo = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "photo.jpg"), photo)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_detectron2(folder: Path) -> None:
    predictor, zoo = snippets("detectron2 itself")
    variables: dict[str, Any] = {}
    exec(predictor, variables)
    found = variables["predict"](cv2.imread("photo.jpg"))["instances"]
    assert len(found) > 0 and found.pred_masks.shape[1:] == (90, 130)
    exec(zoo, variables)
    assert variables["cfg"].MODEL.WEIGHTS.endswith("/137849600/model_final_f10217.pkl")


def test_sahi(folder: Path) -> None:
    pytest.importorskip("sahi")
    (snippet,) = snippets("sahi")
    variables: dict[str, Any] = {}
    # Scores of the hardly trained model are low, and the photo is small.
    exec(snippet.replace("=0.5,", "=0.05,").replace("512", "64"), variables)
    found = variables["result"].object_prediction_list
    assert found
    assert {o.category.name for o in found} <= {"circle", "square", "triangle"}
    assert all(o.mask.full_shape == [90, 130] for o in found)


def test_supervision(folder: Path) -> None:
    sv = pytest.importorskip("supervision")
    (snippet,) = snippets("supervision")
    variables: dict[str, Any] = {}
    exec(snippet, variables)
    detections, instances = variables["detections"], variables["instances"]
    assert len(detections) == len(instances) > 0
    assert np.array_equal(detections.mask, instances.pred_masks.numpy())
    assert set(variables["labels"]) <= {"circle", "square", "triangle"}
    image = cv2.imread("photo.jpg")
    assert not np.array_equal(sv.MaskAnnotator().annotate(image.copy(), detections), image)


def test_detectree2(folder: Path) -> None:
    pytest.importorskip("detectree2.models.predict")
    (folder / "tiles").mkdir()
    cv2.imwrite("tiles/photo.png", cv2.imread("photo.jpg"))
    (snippet,) = snippets("detectree2")
    exec(snippet, {})
    (crowns,) = (folder / "crowns").glob("*.json")
    assert json.loads(crowns.read_text())


def test_layoutparser(folder: Path) -> None:
    pytest.importorskip("layoutparser")
    for name in [name for name in sys.modules if name.split(".")[0] == "layoutparser"]:
        del sys.modules[name]  # imported above, without the patch in the snippet
    (snippet,) = snippets("layoutparser")
    variables: dict[str, Any] = {}
    exec(snippet, variables)
    assert {block.type for block in variables["layout"]} <= {"circle", "square", "triangle"}
    assert len(variables["layout"]) > 0


def test_deepdoctection(folder: Path) -> None:
    pytest.importorskip("deepdoctection")
    (snippet,) = snippets("deepdoctection")
    variables: dict[str, Any] = {}
    exec(snippet, variables)
    assert variables["results"]


def test_the_balloon_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook's calls on drawn balloons, with small images, random weights and two steps."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split, count in (("train", 4), ("val", 2)):
        draw_balloons(tmp_path / "balloon" / split, count)
        # Data sets by folder have the same names; the look-up registers them.
        (tmp_path / "balloon" / f"{split}.json").write_text("{}")
    folders.register_folder_datasets()
    assert folders.is_by_folder("balloon_train")
    try:
        for split in ("train", "val"):
            load = lambda split=split: read_balloons(tmp_path / "balloon" / split)  # noqa: E731
            DatasetCatalog.register(f"balloon_{split}", load)
            MetadataCatalog.get(f"balloon_{split}").set(thing_classes=["balloon"])
        metadata = MetadataCatalog.get("balloon_train")
        record = read_balloons(tmp_path / "balloon" / "train")[0]
        drawing = Visualizer(cv2.imread(record["file_name"])[:, :, ::-1], metadata=metadata)
        assert drawing.draw_dataset_dict(record).get_image().shape == (80, 100, 3)

        name = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
        cfg = get_cfg()
        cfg.merge_from_file(model_zoo.get_config_file(name))
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("balloon_train",), ()
        cfg.DATALOADER.NUM_WORKERS = 2
        assert model_zoo.get_checkpoint_url(name).startswith("https://")
        # The notebook loads this URL, but tests use no network. Random weights need a norm.
        cfg.MODEL.WEIGHTS, cfg.MODEL.RESNETS.NORM = "", "GN"
        cfg.MODEL.DEVICE = "cpu"
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (64,), 64
        cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 2, 0.00025
        cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, []
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 128
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
        cfg.OUTPUT_DIR = str(tmp_path / "output")
        (tmp_path / "output").mkdir()
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()

        cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        predictor = DefaultPredictor(cfg)
        image = cv2.imread(read_balloons(tmp_path / "balloon" / "val")[0]["file_name"])
        outputs = predictor(image)
        drawing = Visualizer(
            image[:, :, ::-1], metadata=metadata, scale=0.5, instance_mode=ColorMode.IMAGE_BW
        )
        found = outputs["instances"].to("cpu")
        assert drawing.draw_instance_predictions(found).get_image().shape == (40, 50, 3)
        evaluator = COCOEvaluator("balloon_val", output_dir=cfg.OUTPUT_DIR)
        loader = build_detection_test_loader(cfg, "balloon_val")
        results = inference_on_dataset(predictor.model, loader, evaluator)
        assert {"bbox", "segm"} <= results.keys()
    finally:
        for split in ("train", "val"):
            DatasetCatalog.remove(f"balloon_{split}")
            MetadataCatalog.remove(f"balloon_{split}")


def draw_balloons(folder: Path, count: int) -> None:
    """Draws images of one disc each, and the notebook's via_region_data.json."""
    folder.mkdir(parents=True)
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    regions = {}
    for number in range(count):
        image = np.full((80, 100, 3), 60, np.uint8)
        center, radius = (40 + 5 * number, 40), 20
        cv2.circle(image, center, radius, (40, 40, 220), -1)
        cv2.imwrite(str(folder / f"{number}.jpg"), image)
        outline = {
            "all_points_x": (center[0] + radius * np.cos(angles)).astype(int).tolist(),
            "all_points_y": (center[1] + radius * np.sin(angles)).astype(int).tolist(),
        }
        region = {"shape_attributes": outline, "region_attributes": {}}
        regions[str(number)] = {"filename": f"{number}.jpg", "regions": {"0": region}}
    (folder / "via_region_data.json").write_text(json.dumps(regions))


def read_balloons(folder: Path) -> list[dict[str, Any]]:
    records = []
    for entry in json.loads((folder / "via_region_data.json").read_text()).values():
        path = str(folder / entry["filename"])
        height, width = cv2.imread(path).shape[:2]
        annotations = []
        for region in entry["regions"].values():
            xs = region["shape_attributes"]["all_points_x"]
            ys = region["shape_attributes"]["all_points_y"]
            polygon = [v + 0.5 for point in zip(xs, ys, strict=True) for v in point]
            box = [min(xs), min(ys), max(xs), max(ys)]
            annotations.append(
                {
                    "bbox": box,
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "segmentation": [polygon],
                    "category_id": 0,
                }
            )
        records.append(
            {
                "file_name": path,
                "image_id": len(records),
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    return records


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ours", [False, True], ids=["StandardROIHeads", "FusedROIHeads"])
def test_the_calls_of_detectron2s_analysis_and_export(ours: bool) -> None:
    """What tools/analyze_model.py and tools/deploy/export_model.py call, for tracing."""
    model = models.build("fpn", ours=ours).eval()
    inputs = [{"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96}]
    flops = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False)
    assert flops.total() > 1e6
    assert "backbone" in parameter_count_table(model, max_depth=2)
    adapter = TracingAdapter(model, [{"image": inputs[0]["image"]}])
    adapter.eval()
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        expected = model.inference(inputs, do_postprocess=False)[0]
    (found,) = adapter.outputs_schema(traced(inputs[0]["image"]))
    assert len(found["instances"]) == len(expected) > 0
    assert "caffe2" not in sys.modules
