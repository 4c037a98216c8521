"""Fitting a checkpoint to a model: classes by name, and the config that fits."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from mask_rcnn_plus import UserError
from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.fitting import (
    fitting_config,
    match_classes,
    stored_classes,
    zoo_model,
)
from tests.shrink import shrink

CONFIGS = Path(__file__).parents[2] / "configs/coco"
SCORES, BOXES, MASKS = (
    f"roi_heads.{name}.weight"
    for name in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
)


def head(classes: int, start: float, *, agnostic: bool = False) -> dict[str, Tensor]:
    """Class heads whose row r holds start + r."""

    def rows(count: int, *shape: int) -> Tensor:
        return (start + torch.arange(count)).float().reshape(-1, *(1 for _ in shape)) + torch.zeros(
            count, *shape
        )

    per_class = 1 if agnostic else classes
    return {
        SCORES: rows(classes + 1, 2),
        SCORES.replace("weight", "bias"): rows(classes + 1),
        BOXES: rows(4 * per_class, 2),
        MASKS: rows(per_class, 3, 1, 1),
    }


def values(state: dict[str, Tensor], key: str) -> list[float]:
    return torch.as_tensor(state[key]).flatten(1)[:, 0].tolist()


def test_rows_follow_the_names_of_classes() -> None:
    state, own = head(3, 0), head(2, 100)
    text = match_classes(state, own, stored_names=["cat", "dog", "car"], names=["tree", "Car"])
    assert "'Car'" not in text and "Car" in text and "tree" in text
    assert values(state, SCORES) == [100, 2, 3]  # the new class, car, background
    assert state[SCORES.replace("weight", "bias")].tolist() == [100, 2, 3]
    assert values(state, BOXES) == [100, 101, 102, 103, 8, 9, 10, 11]
    assert values(state, MASKS) == [100, 2]


def test_an_equal_number_of_classes_in_another_order() -> None:
    state = {key: value.numpy() for key, value in head(2, 0).items()}
    assert isinstance(state[SCORES], np.ndarray)
    assert match_classes(state, head(2, 100), stored_names=["a", "b"], names=["b", "a"])
    assert values(state, SCORES) == [1, 0, 2]
    assert values(state, BOXES) == [4, 5, 6, 7, 0, 1, 2, 3]


def test_cascade_and_class_agnostic_heads() -> None:
    state, own = head(3, 0, agnostic=True), head(1, 100, agnostic=True)
    state, own = (
        {key.replace("predictor.cls", "predictor.1.cls"): value for key, value in each.items()}
        for each in (state, own)
    )
    match_classes(state, own, stored_names=["cat", "dog", "car"], names=["dog"])
    assert values(state, SCORES.replace("predictor.cls", "predictor.1.cls")) == [1, 3]
    assert values(state, BOXES) == [0, 1, 2, 3]  # one box for all classes


@pytest.mark.parametrize(
    ("stored", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (["a", "b"], ["x", "y"]),  # renamed classes
        ([], ["a", "b"]),
        (["a", "b"], []),
        (["a", "b", "c"], ["x", "y"]),
    ],
)
def test_nothing_changes(stored: list[str], names: list[str]) -> None:
    state = head(len(stored), 0)
    before = {key: value.clone() for key, value in state.items()}
    assert match_classes(state, head(len(names), 100), stored_names=stored, names=names) == ""
    assert all(torch.equal(state[key], before[key]) for key in before)


def test_classes_of_the_model_zoo() -> None:
    assert stored_classes({"model": head(80, 0)})[:2] == ["person", "bicycle"]
    assert stored_classes({"model": head(1, 0)}) == []
    keypoints = {**head(1, 0), "roi_heads.keypoint_head.score_lowres.bias": torch.zeros(17)}
    assert stored_classes({"model": keypoints}) == ["person"]
    assert stored_classes({"model": head(80, 0), "class_names": ["own"]}) == ["own"]


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn_R_50_FPN_3x",
        "mask_rcnn_X_101_32x8d_FPN_3x",
        "mask_rcnn_R_101_DC5_3x",
        "faster_rcnn_R_50_C4_3x",
        "cascade_mask_rcnn_R_50_FPN_3x",
        "keypoint_rcnn_R_101_FPN_3x",
    ],
)
def test_the_model_of_the_zoo(name: str) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    assert zoo_model(state) == name.removesuffix("_3x")
    assert zoo_model({**state, "backbone.bottom_up.res3.0.conv2_offset.weight": 0}) == ""
    del state[next(key for key in state if key.endswith("res2.0.conv1.weight"))]
    assert zoo_model(state) == ""


def tiny(name: str, *settings: str) -> nn.Module:
    return build_model(shrink(load_config(CONFIGS / f"{name}.yaml", list(settings))))


@pytest.mark.parametrize(
    ("file", "model", "layers", "config"),
    [
        # The deeper model has every parameter of the other one.
        ("mask_rcnn_R_101_FPN_3x", "mask_rcnn_R_50_FPN_3x", "bottom_up", "mask_rcnn_R_101_FPN"),
        ("mask_rcnn_R_50_C4_3x", "mask_rcnn_R_50_FPN_3x", "roi_heads.res5", "mask_rcnn_R_50_C4"),
        ("cascade_mask_rcnn_R_50_FPN_3x", "mask_rcnn_R_50_FPN_3x", "box_head", "cascade_mask_rcnn"),
        ("faster_rcnn_R_50_FPN_3x", "mask_rcnn_R_50_FPN_3x", "mask_head", "faster_rcnn_R_50_FPN"),
    ],
)
def test_weights_of_another_architecture_name_the_layers_and_the_config(
    file: str,
    model: str,
    layers: str,
    config: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(CONFIGS.parents[1])
    path = str(tmp_path / "file.pth")
    torch.save({"model": tiny(file).state_dict()}, path)
    own = tiny(model)
    with caplog.at_level(logging.INFO):
        try:
            Checkpointer(own).load(path)
            (line,) = [r.message for r in caplog.records if "parameters loaded" in r.message]
        except UserError as error:  # C4's weights fit no layer of an FPN
            line = str(error)
        caplog.clear()
        try:
            Checkpointer(own, strict=True).load(path)
            (strict,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
        except UserError as error:
            strict = str(error)
    assert layers in line
    folder = "coco" if "faster" in config else "finetune"
    assert f"--config-file configs/{folder}/{config}" in line
    # All have three classes instead of COCO's 80.
    assert f"--config-file configs/coco/{file}.yaml MODEL.ROI_HEADS.NUM_CLASSES 3" in strict
    assert "\n" not in line + strict


def test_weights_of_a_run_name_its_config(tmp_path: Path) -> None:
    weights = str(tmp_path / "a run" / "model_final.pth")
    checkpoint = {"model": {"res.weight": torch.zeros(1)}, "config": "MODEL: {}"}
    assert fitting_config(checkpoint, {}, weights=weights, trains=True) == ""
    (tmp_path / "a run").mkdir()
    (tmp_path / "a run" / "config.yaml").touch()
    text = fitting_config(checkpoint, {}, weights=weights, trains=True)
    assert text.endswith(f"--config-file '{tmp_path}/a run/config.yaml'")
    # A file of the zoo beside a config has nothing to do with it.
    del checkpoint["config"]
    assert fitting_config(checkpoint, {}, weights=weights, trains=True) == ""


def test_weights_of_torchvision_name_the_command_that_converts_them() -> None:
    state = {"backbone.body.layer1.0.conv1.weight": torch.zeros(1)}
    text = fitting_config({"model": state}, {}, weights="maskrcnn.pth", trains=True)
    assert "convert-torchvision" in text


def test_another_number_of_classes_is_not_another_architecture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even for the weights of a run that has another number."""
    path = tmp_path / "model_final.pth"
    (tmp_path / "config.yaml").touch()
    name = "keypoint_rcnn_R_50_FPN_3x"
    stored = tiny(name, "MODEL.ROI_HEADS.NUM_CLASSES", "2").state_dict()
    torch.save({"model": stored, "config": "MODEL: {}"}, path)
    model = tiny(name, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5")
    with caplog.at_level(logging.INFO):
        Checkpointer(model).load(str(path))
    (line,) = [r.message for r in caplog.records if "parameters loaded" in r.message]
    assert "box_predictor" in line and "keypoint_head" in line and "--config-file" not in line
