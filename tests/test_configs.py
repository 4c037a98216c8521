"""Every YAML in configs/ trains and predicts, and repeats no setting of its base."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.model_zoo.model_zoo import _ModelZooUrls
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import load_config
from tests.shrink import batch, calm, shrink

CONFIGS = Path(__file__).parents[1] / "configs"
every_config = pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)


def own_text(path: Path) -> dict[str, Any]:
    """The keys in the file itself."""
    return yaml.safe_load(path.read_text())


def leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@every_config
def test_it_trains_and_predicts(path: Path) -> None:
    cfg = load_config(path)
    if cfg.MODEL.BACKBONE.NAME.startswith("build_timm"):
        pytest.importorskip("timm")
    shrink(cfg)
    torch.manual_seed(0)
    model = calm(build_model(cfg))
    inputs = batch(cfg)
    with EventStorage():
        losses = model(inputs)
    for part, on in (("mask", cfg.MODEL.MASK_ON), ("keypoint", cfg.MODEL.KEYPOINT_ON)):
        assert any(part in name for name in losses) == on, losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    reached = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if parameter.grad.any():
                reached.add(name.split(".")[0])
    assert reached == {name for name, _ in model.named_children()}

    model.eval()
    with torch.no_grad():
        (found,) = (output["instances"] for output in model(inputs[:1]))
    assert found.pred_boxes.tensor.shape == (len(found), 4)
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
    assert found.has("pred_keypoints") == cfg.MODEL.KEYPOINT_ON


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(CONFIGS.rglob("*.yaml")) if "_BASE_" in own_text(path)],
    ids=lambda path: str(path.relative_to(CONFIGS)),
)
def test_repeats_no_setting_of_its_base(path: Path) -> None:
    own = own_text(path)
    before = dict(leaves(load_config(path.parent / own.pop("_BASE_"))))
    after = dict(leaves(load_config(path)))
    assert not [key for key, _ in leaves(own) if before[key] == after[key]]


@every_config
def test_it_has_at_most_two_bases(path: Path) -> None:
    for _ in range(3):
        base = own_text(path).get("_BASE_")
        if base is None:
            return
        path = path.parent / base
    pytest.fail("a third base")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "coco").glob("*_rcnn_*.yaml")), ids=lambda path: path.stem
)
def test_a_config_with_a_model_zoo_name_has_the_zoos_settings(path: Path) -> None:
    """The schedules, ImageNet weights and sizes that the model zoo publishes for these names."""
    cfg = load_config(path)
    name = path.stem
    steps, iterations = {
        "1x": ((60000, 80000), 90000),
        "3x": ((210000, 250000), 270000),
    }[name[-2:]]
    solver = cfg.SOLVER
    assert (steps, iterations) == (solver.STEPS, solver.MAX_ITER)
    assert (solver.BASE_LR, solver.IMS_PER_BATCH, solver.WEIGHT_DECAY) == (0.02, 16, 1e-4)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)

    weights, depth, groups = {
        "R_50": ("MSRA/R-50", 50, 1),
        "R_101": ("MSRA/R-101", 101, 1),
        "X_101": ("FAIR/X-101-32x8d", 101, 32),
    }[re.search(r"[RX]_\d+", name)[0]]
    assert f"detectron2://ImageNetPretrained/{weights}.pkl" == cfg.MODEL.WEIGHTS
    assert (depth, groups) == (cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NUM_GROUPS)

    proposals, candidates = {
        "C4": (["res4"], (12000, 6000)),
        "DC5": (["res5"], (12000, 6000)),
        "FPN": (["p2", "p3", "p4", "p5", "p6"], (2000, 1000)),
    }[name.split("_")[-2]]
    rpn = cfg.MODEL.RPN
    assert proposals == rpn.IN_FEATURES
    assert candidates == (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST)
    assert ("mask" in name) == cfg.MODEL.MASK_ON
    assert ("keypoint" in name) == cfg.MODEL.KEYPOINT_ON
    assert ("Cascade" in cfg.MODEL.ROI_HEADS.NAME) == ("cascade" in name)
    assert cfg.MODEL.ROI_HEADS.NAME.startswith("Fused")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "finetune").glob("*_rcnn_*.yaml")), ids=lambda path: path.stem
)
def test_fine_tuning_starts_from_the_zoos_3x_model_of_its_name(path: Path) -> None:
    weights = load_config(path).MODEL.WEIGHTS
    table = _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX
    (name,) = (name for name in table if name.endswith(f"/{path.stem}_3x"))
    assert weights == f"detectron2://{name}/{table[name]}"


# The number of rows in each of the paper's tables (arXiv:1703.06870).
ROWS = {"2a": 5, "2b": 3, "2c": 5, "2d": 2, "2e": 3, "3": 2, "5": 4, "6": 2}


def test_every_row_of_the_papers_tables_has_a_file() -> None:
    text = (CONFIGS / "README.md").read_text()
    rows = re.findall(r"^\| (\w+) \|.*?\| \[?`?paper/(\w+\.yaml)", text, re.MULTILINE)
    files = {table: [name for t, name in rows if t == table] for table in ROWS}
    assert {table: len(set(names)) for table, names in files.items()} == ROWS
    assert {name for _, name in rows} == {path.name for path in (CONFIGS / "paper").iterdir()}


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "paper").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_row_of_the_paper_is_trained_as_in_the_paper(path: Path) -> None:
    """Section 3.1, and section 5 for the keypoints' tables."""
    cfg = load_config(path)
    people = path.stem[0] in "56"
    solver = cfg.SOLVER
    schedule = ((60000, 80000), 90000) if people else ((120000,), 160000)
    assert schedule == (solver.STEPS, solver.MAX_ITER)
    resnext = "X_101" in path.stem
    assert ((0.01, 8) if resnext else (0.02, 16)) == (solver.BASE_LR, solver.IMS_PER_BATCH)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM, solver.GAMMA) == (1e-4, 0.9, 0.1)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    assert (min(cfg.INPUT.MIN_SIZE_TRAIN), max(cfg.INPUT.MIN_SIZE_TRAIN)) == (
        640 if people else 800,
        800,
    )
    assert (1 if people else 80) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    # Five scales and three ratios, on the levels of a pyramid or on one map.
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    assert sorted(size for level in anchors.SIZES for size in level) == [32, 64, 128, 256, 512]
    assert anchors.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]
    pyramid = "fpn" in cfg.MODEL.BACKBONE.NAME
    assert (512 if pyramid else 64) == cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE
    assert cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION == 0.25
    assert (1000 if pyramid else 300) == cfg.MODEL.RPN.POST_NMS_TOPK_TEST
    box = cfg.MODEL.ROI_BOX_HEAD
    kind = {"pool": "ROIPool", "warp": "ROIWarp"}.get(
        (re.search("roi_(pool|warp)", path.stem) or [""])[0].removeprefix("roi_"), "ROIAlign"
    )
    assert kind + "Max" * (path.stem in ("2c_roi_align_max", "2c_roi_warp_max")) == box.POOLER_TYPE
    heads = [cfg.MODEL.ROI_MASK_HEAD] * (
        cfg.MODEL.MASK_ON and "Res5" not in cfg.MODEL.ROI_HEADS.NAME
    )
    heads += [cfg.MODEL.ROI_KEYPOINT_HEAD] * cfg.MODEL.KEYPOINT_ON
    for head in heads:
        assert (head.POOLER_TYPE, head.POOLER_SAMPLING_RATIO) == (box.POOLER_TYPE, 2)
