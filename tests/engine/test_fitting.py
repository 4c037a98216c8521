"""Fitting a checkpoint to a model: classes by name, and the config that it belongs to."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from mask_rcnn_plus.config import load_config
from mask_rcnn_plus.engine.fitting import config_of, match_classes, stored_classes

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
def test_the_config_that_weights_belong_to(name: str) -> None:
    cfg = load_config(CONFIGS / f"{name}.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        state = build_model(cfg).state_dict()
    assert config_of(state) == f"configs/coco/{name}.yaml"
    del state[next(key for key in state if key.endswith("res2.0.conv1.weight"))]
    assert config_of(state) == ""
