"""python -m benchmarks.model on a tiny model: its output and its refusals."""

import copy
import json
import logging
import math
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import yaml
from detectron2.structures import Boxes, Instances

from benchmarks import harness, model_measure
from benchmarks import model as model_benchmark
from benchmarks.model_implementations import (
    build_implementations,
    our_config,
    set_limits,
    stock_config,
    torchvision_weights,
)
from benchmarks.model_inputs import find_threshold, set_random_weights, training_batches
from benchmarks.model_measure import agreement, average_precision, fit_line
from mask_rcnn_plus.data import register_folder_datasets
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.arguments import run_command
from mask_rcnn_tools.convert_torchvision import convert, parameter_names
from tests.benchmarks.test_roi_align import table
from tests.conftest import TINY
from tests.modeling.models import build, config

main = partial(run_command, model_benchmark.main)


SMALL = (
    *("--threads", "1", "--repeats", "1", "--image-size", "64x96", "--detections", "3"),
    *("--train-image-size", "64x64", "--dtype", "fp32,bf16"),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file of a tiny model with frozen norms."""
    path = tmp_path_factory.mktemp("model") / "tiny.yaml"
    values = copy.deepcopy(TINY)
    values["MODEL"]["RESNETS"]["NORM"] = "FrozenBN"
    values["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] = 3
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def result(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, Path]:
    """Markdown and json of one run, and its folder."""
    folder = tmp_path_factory.mktemp("benchmark") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_measure.SWEEPS, "batch", (1, 2))
        patch.setitem(model_measure.SWEEPS, "detections", (1, 3))
        arguments = ["--config-file", str(tiny), *SMALL, "--output", str(folder)]
        assert main([*arguments, "--sweep", "batch,detections"]) == 0
    text = (folder / "model.md").read_text()
    return text, json.loads((folder / "model.json").read_text()), folder


@pytest.mark.slow
def test_our_detections_agree_with_stock_detectron2(result: tuple[str, dict, Path]) -> None:
    stock, ours, bf16 = result[1]["inference"]
    assert [row["side"] for row in (stock, ours, bf16)] == ["stock fp32", "ours fp32", "ours bf16"]
    # Two images, each with the wanted number of detections.
    assert stock["detections"] == 3
    exact = ours["agreement"]
    assert exact["expected"] == exact["found"] == exact["matched"] == 6
    assert exact["score_difference_largest"] < 1e-4
    assert exact["box_difference_largest"] < 0.05
    assert exact["mask_iou_least"] > 0.99
    assert bf16["agreement"]["score_difference_largest"] > exact["score_difference_largest"]


@pytest.mark.slow
def test_stages_add_up_to_the_total(result: tuple[str, dict, Path]) -> None:
    for row in result[1]["inference"]:
        assert {"backbone", "FPN", "RPN head", "box head", "mask head", "paste, RLE"} <= set(
            row["stages"]
        )
        # With one turn, the median of the sums is the sum.
        assert sum(row["stages"].values()) == pytest.approx(row["total"])
        assert row["images_per_second"] == pytest.approx(1000 / row["total"])
    for row in result[1]["training"]:
        stages = dict(row["stages"])
        assert stages.pop("data") > 0
        assert set(stages) == {"forward", "backward", "optimiser", "other"}
        assert sum(stages.values()) == pytest.approx(row["total"])
        assert row["images_per_second"] == pytest.approx(2000 / row["total"])


@pytest.mark.slow
def test_training_losses_agree_with_stock_detectron2(result: tuple[str, dict, Path]) -> None:
    stock, ours, bf16 = result[1]["training"]
    assert len(stock["losses"]) == 2 and stock["loss_difference"] == 0
    assert stock["losses"][0] == pytest.approx(ours["losses"][0], rel=1e-4)
    assert stock["losses"][0] != stock["losses"][1]
    assert bf16["losses"][0] == pytest.approx(stock["losses"][0], rel=0.1)
    assert bf16["losses"][0] != ours["losses"][0]


@pytest.mark.slow
def test_markdown_and_json_contain_the_same_values(result: tuple[str, dict, Path]) -> None:
    text, report, folder = result
    assert report["command"] in text and f"torch {torch.__version__}" in text
    # The first table is that of inference.
    lines = text.split("## Inference")[1].split("\n\n")[1]
    rows = {row["ms per batch"]: row for row in table(lines.replace("---:", "---"))}
    stock, ours, _ = report["inference"]
    total = rows["**total**"]
    assert total["stock fp32"] == f"{stock['total']:.1f}"
    assert total["ours fp32 against stock"] == f"{stock['total'] / ours['total']:.2f}x"
    stage = rows["box pooler"]["ours fp32 against stock"]
    ratio = stock["stages"]["box pooler"] / ours["stages"]["box pooler"]
    assert stage == f"{ratio:.2f}x"
    assert [line["counts"] for line in report["sweep"]] == [[1, 2]] * 3 + [[1, 3]] * 3
    assert (folder / "model_sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dtype", "fp32,bf61"], "'bf61' is unknown; did you mean 'bf16'?"),
        (["--against", "mmdet"], "'mmdet' is unknown; there are stock, torchvision"),
        (["--image-size", "800"], "must be HxW in pixels"),
        (["--sweep", "heads"], "'heads' is unknown; there are batch, detections"),
        (["--dtype", "fp16"], "--dtype fp16 needs CUDA"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--data", "no_such_train"], "'no_such_train' is not registered"),
        (["--against", "torchvision"], "of R50-FPN with masks"),
        (
            ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIWarp"],
            "'ROIWarp' is not in detectron2",
        ),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main(["--config-file", str(tiny), *SMALL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_unsuitable_weights_and_data_are_refused_before_anything_is_printed(
    tiny: Path,
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({"model": {"backbone.fpn_output2.bias": torch.zeros(3)}}, tmp_path / "other.pth")
    unlabelled = json.loads((shapes / "shapes" / "val.json").read_text()) | {"annotations": []}
    (tmp_path / "bare" / "images").mkdir(parents=True)
    for image in unlabelled["images"]:
        shutil.copy(shapes / "shapes" / "images" / image["file_name"], tmp_path / "bare" / "images")
    (tmp_path / "bare" / "train.json").write_text(json.dumps(unlabelled))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    # Without pytest's handlers warnings go to standard error, as in a command.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    for arguments, expected in [
        (["--weights", str(tmp_path / "other.pth")], "do not fit this model"),
        (["--data", "bare_train"], "nothing to train on"),
        (["--data", "shapes_val", "MODEL.ROI_HEADS.NUM_CLASSES", "4"], "has 3 classes: set it"),
    ]:
        capsys.readouterr()
        assert main(["--config-file", str(tiny), *SMALL, *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1 and expected in err


def test_stock_and_our_configs_differ_only_in_heads_and_layout() -> None:
    cfg = config("cascade")
    stock, ours = stock_config(cfg), our_config(stock_config(cfg))
    assert stock.MODEL.ROI_HEADS.NAME == "CascadeROIHeads" and not stock.MODEL.CHANNELS_LAST
    assert ours.MODEL.ROI_HEADS.NAME == "FusedCascadeROIHeads" and ours.MODEL.CHANNELS_LAST
    ours.MODEL.ROI_HEADS.NAME, ours.MODEL.CHANNELS_LAST = "CascadeROIHeads", False
    assert ours == stock
    with pytest.raises(UserError, match="ROIPoolMax"):
        cfg.defrost()
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = "ROIPoolMax"
        stock_config(cfg)


def test_random_weights_find_the_wanted_number_of_objects() -> None:
    model = build("fpn", ours=False).eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 64, 64), generator=generator, dtype=torch.uint8)
    inputs = [{"image": image, "height": 64, "width": 64}]
    with torch.no_grad():
        high = set_random_weights(model, inputs, 2)
        (found,) = model.inference(inputs, do_postprocess=False)
        assert len(found) == 2 and found.scores.min() > high
        low = find_threshold(model, inputs, 5)
        assert low < high
        assert len(model.inference(inputs, do_postprocess=False)[0]) == 5
        set_limits(model, threshold=1.0, detections=5)
        assert len(model.inference(inputs, do_postprocess=False)[0]) == 0


def instances(boxes: list, scores: list, classes: list, masks: torch.Tensor) -> Instances:
    return Instances(
        (10, 10),
        pred_boxes=Boxes(torch.tensor(boxes)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
        rle=[mask_util.encode(m.numpy().astype("uint8", order="F")) for m in masks],
    )


def test_agreement_compares_matching_objects() -> None:
    masks = torch.zeros(3, 10, 10)
    masks[0, :4, :4] = masks[1, 5:, 5:] = masks[2, :2] = 1
    boxes = [[0.0, 0, 4, 4], [5, 5, 10, 10], [0, 0, 10, 2]]
    expected = instances(boxes, [0.9, 0.8, 0.7], [1, 2, 1], masks)
    # The second detection has another class, the order differs, and one box moves by half a pixel.
    other = masks.flip(0).clone()
    other[2, 0, :4] = 0
    moved = [boxes[2], boxes[1], [0.0, 0.5, 4, 4]]
    found = instances(moved, [0.7, 0.8, 0.75], [1, 3, 1], other)
    summary = agreement([expected], [found])
    assert (summary["expected"], summary["found"], summary["matched"]) == (3, 3, 2)
    assert summary["score_difference_largest"] == pytest.approx(0.15)
    assert summary["box_difference_largest"] == pytest.approx(0.5)
    assert summary["mask_iou_least"] == pytest.approx(12 / 16)
    assert summary["mask_iou_mean"] == pytest.approx((12 / 16 + 1) / 2)
    assert agreement([expected[:0]], [found])["mask_iou_mean"] is None


def test_least_squares_line_by_hand() -> None:
    line = fit_line([1, 2, 4], [15.0, 25.0, 45.0])
    assert (line["slope"], line["intercept"]) == (pytest.approx(10), pytest.approx(5))
    assert line["determination"] == pytest.approx(1)
    # Squares: the best line through (0, 0), (1, 1), (2, 4) is 2x - 1/3, which leaves 2/3 of 26/3.
    bent = fit_line([0, 1, 2], [0.0, 1.0, 4.0])
    assert bent["slope"] == pytest.approx(2) and bent["intercept"] == pytest.approx(-1 / 3)
    assert bent["determination"] == pytest.approx(1 - (2 / 3) / (26 / 3))


def test_conversion_to_torchvision_and_back_keeps_the_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for _, name in parameter_names(masks=True):
        shape = (4,)
        if name.endswith("conv1.weight") and "stem" in name:
            shape = (2, 3, 1, 1)
        elif ".bbox_pred." in name:
            shape = (12, 2) if name.endswith("weight") else (12,)
        elif ".mask_head.predictor." in name:
            shape = (3, 2, 1, 1) if name.endswith("weight") else (3,)
        state[name] = torch.rand(shape, generator=generator) + 0.1
    theirs = torchvision_weights(state)
    # torchvision's background class comes first.
    scores = state["roi_heads.box_predictor.cls_score.bias"]
    assert theirs["roi_heads.box_predictor.cls_score.bias"].tolist() == [scores[3], *scores[:3]]
    back = convert(theirs, batch_norm_eps=1e-5)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_training_images_have_the_wanted_size() -> None:
    cfg = stock_config(config("fpn"))
    batches, (stock, ours) = training_batches(cfg, None, batch=2, batches=1, size=(64, 96))
    assert [tuple(sample["image"].shape) for sample in batches[0]] == [(3, 64, 96)] * 2
    assert all(len(sample["instances"].gt_masks) for sample in batches[0])
    assert stock > 0 and ours > 0


def test_peak_memory_of_a_call() -> None:
    def run() -> None:
        torch.ones(2**24)  # 64 MiB, freed before the call ends

    peak = harness.peak_memory(run, "cpu")
    assert peak is None or math.isclose(peak, 64, abs_tol=16)


@pytest.mark.slow
def test_a_data_set_provides_images_and_ap(trained: Path, shapes: Path, tmp_path: Path) -> None:
    arguments = [
        *("--config-file", str(trained / "config.yaml"), "--data", "shapes_val"),
        *("--weights", str(trained / "model_final.pth"), "--output", str(tmp_path)),
        *("--threads", "1", "--repeats", "1", "--dtype", "fp32"),
    ]
    assert main([*arguments, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]) == 0
    report = json.loads((tmp_path / "model.json").read_text())
    assert report["AP"].keys() == {"stock fp32", "ours fp32"}
    for task in ("bbox", "segm"):
        stock, ours = (report["AP"][name][task] for name in ("stock fp32", "ours fp32"))
        assert ours == pytest.approx(stock, abs=0.01)
    assert report["inference"][0]["detections"] > 0
    assert report["training"][0]["stages"]["data"] > 0
    assert "| ours fp32 |" in (tmp_path / "model.md").read_text()


def test_a_data_sets_keypoints_replace_the_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "dots"
    (folder / "images").mkdir(parents=True)
    cv2.imwrite(str(folder / "images" / "0.png"), np.full((64, 64, 3), 90, np.uint8))
    points = [x for point in ([12, 12], [36, 12], [12, 36], [36, 36]) for x in (*point, 2)]
    box = {"bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0, "category_id": 1}
    ring = [10, 10, 40, 10, 40, 40, 10, 40]
    instance = {
        "id": 1,
        "image_id": 1,
        "segmentation": [ring],
        "keypoints": points,
        "num_keypoints": 4,
    }
    names = ["left_a", "right_a", "left_b", "right_b"]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": 64, "width": 64}],
        "annotations": [{**box, **instance}],
        "categories": [{"id": 1, "name": "dot", "keypoints": names, "skeleton": []}],
    }
    (folder / "train.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_folder_datasets()

    cfg = stock_config(config("keypoint", ROI_HEADS__NUM_CLASSES=1))
    # The config's data set has other keypoints, which these images lack.
    cfg.DATASETS.TRAIN = ["keypoints_coco_2017_train"]
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 4
    cfg.DATALOADER.NUM_WORKERS = 0
    batches, _ = training_batches(cfg, "dots_train", batch=1, batches=1, size=(64, 64))
    assert batches[0][0]["instances"].gt_keypoints.tensor.shape == (1, 4, 3)
    model = build("keypoint", ours=False, ROI_HEADS__NUM_CLASSES=1).eval()
    implementations = build_implementations(
        cfg, model, against=["stock"], dtypes=[], image_size=(64, 64)
    )
    set_limits(model, threshold=0.0, detections=5)
    found = average_precision(cfg, implementations, "dots_train")
    assert found["stock fp32"].keys() == {"bbox", "keypoints"}
