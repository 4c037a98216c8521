"""Configs from and for programs that only know detectron2's keys."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as detectron2_config
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.modeling import build_roi_heads
from detectron2.modeling.meta_arch.build import build_model

from mask_rcnn_plus import BatchPredictor, UserError, get_cfg, load_config
from mask_rcnn_plus.config import complete
from mask_rcnn_plus.config.stock import STOCK_CONFIG, stock_config, write_stock_config
from mask_rcnn_plus.engine.setup import setup
from mask_rcnn_plus.engine.trainer import Trainer
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]


def tiny(**model: object) -> CfgNode:
    """The tiny Mask R-CNN in a config that a program built with detectron2's ``get_cfg``."""
    cfg = detectron2_config()
    cfg.merge_from_other_cfg(CfgNode(TINY))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    for group, name in model.items():
        cfg.MODEL[group].NAME = name
    return cfg


@pytest.mark.parametrize(
    "model",
    [
        {"ROI_HEADS": "FusedROIHeads"},
        {"ROI_HEADS": "FusedCascadeROIHeads"},
        {"ROI_HEADS": "FusedROIHeads", "ROI_MASK_HEAD": "MLPMaskHead"},
        {"ROI_HEADS": "StandardROIHeads", "ROI_MASK_HEAD": "SoftmaxMaskHead"},
        {"ROI_HEADS": "FusedROIHeads", "BACKBONE": "build_timm_fpn_backbone"},
    ],
    ids=lambda model: "-".join(model.values()),
)
def test_components_have_defaults_for_keys_that_the_config_lacks(model: dict[str, str]) -> None:
    if "BACKBONE" in model:
        pytest.importorskip("timm")
    cfg = tiny(**model)
    if model["ROI_HEADS"] == "FusedCascadeROIHeads":
        cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.freeze()
    before = cfg.dump()
    built = build_model(cfg)
    heads = build_roi_heads(cfg, built.backbone.output_shape())  # without build_model's wrapper
    assert type(heads).__name__ == type(built.roi_heads).__name__ == model["ROI_HEADS"]
    assert cfg.dump() == before


def test_training_evaluation_and_prediction_accept_a_config_without_our_keys(
    shapes: Path, tmp_path: Path, trained: Path
) -> None:
    cfg = tiny(ROI_HEADS="FusedROIHeads")
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    (tmp_path / "output").mkdir()
    cfg.SOLVER.MAX_ITER = 1
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.train()
    assert set(Trainer.test(cfg, trainer.model)) == {"bbox", "segm", "boundary"}

    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    image = torch.randint(0, 255, (64, 64, 3)).numpy().astype("uint8")
    ours = BatchPredictor(cfg)([image])[0]
    assert len(ours) == len(DefaultPredictor(cfg)(image)["instances"]) > 0


def test_a_complete_config_is_the_same_object_and_others_keep_their_values() -> None:
    ours = get_cfg()
    assert complete(ours) is ours
    theirs = detectron2_config()
    theirs.set_new_allowed(True)
    theirs.RESIZE = "fixed"  # a key of another program
    theirs.SOLVER.AMP.ENABLED = True
    theirs.freeze()
    full = complete(theirs)
    assert full.is_frozen() and "LOSS_CLS" not in theirs.MODEL.ROI_BOX_HEAD
    assert full.RESIZE == "fixed" and full.SOLVER.AMP.ENABLED and full.MODEL.DEVICE == "cuda"
    assert full.SOLVER.AMP.DTYPE == ours.SOLVER.AMP.DTYPE
    assert ours.SOLVER.EMA == full.SOLVER.EMA


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("mask_rcnn_R_50_FPN_1x", "StandardROIHeads"),
        ("mask_rcnn_R_50_C4_1x", "Res5ROIHeads"),
        ("keypoint_rcnn_R_50_FPN_1x", "StandardROIHeads"),
        ("cascade_mask_rcnn_R_50_FPN_1x", "CascadeROIHeads"),
    ],
)
def test_a_stock_config_has_the_keys_and_heads_of_detectron2(
    name: str, heads: str, tmp_path: Path
) -> None:
    options = ["SOLVER.EMA.ENABLED", "True", "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.MAX_ITER", "7"]
    cfg = load_config(ROOT / f"configs/coco/{name}.yaml", options)
    write_stock_config(cfg, tmp_path / STOCK_CONFIG)
    stock = detectron2_config()
    stock.merge_from_file(str(tmp_path / STOCK_CONFIG))
    assert heads == stock.MODEL.ROI_HEADS.NAME
    assert stock.SOLVER.MAX_ITER == 7
    assert stock.MODEL.ANCHOR_GENERATOR == cfg.MODEL.ANCHOR_GENERATOR
    comments = [t for t in (tmp_path / STOCK_CONFIG).read_text().splitlines() if t[0] == "#"]
    assert "SOLVER.OPTIMIZER, SOLVER.EMA.ENABLED" in " ".join(comments)


@pytest.mark.parametrize(
    "file", ["quickstart", "small_data", "timm/mask_rcnn_swin_tiny_FPN_3x", "paper/2e_mlp_3_hidden"]
)
def test_detectron2s_own_config_merges_every_config_of_the_project(file: str) -> None:
    cfg, path = detectron2_config(), ROOT / f"configs/{file}.yaml"
    cfg.merge_from_file(str(path))
    assert complete(cfg).dump() == load_config(path, ["MODEL.DEVICE", cfg.MODEL.DEVICE]).dump()


def test_merging_adds_only_the_keys_of_the_file() -> None:
    cfg = detectron2_config()
    cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"EMA": {"ENABLED": True}}, "DATA_CHECK": "off"}))
    assert cfg.SOLVER.EMA == {"ENABLED": True} and cfg.DATA_CHECK == "off"
    assert cfg.MODEL.DEVICE == "cuda" and "OPTIMIZER" not in cfg.SOLVER
    assert complete(cfg).SOLVER.EMA.DECAY == get_cfg().SOLVER.EMA.DECAY
    assert "EMA" not in detectron2_config().SOLVER
    with pytest.raises(KeyError, match=r"SOLVER\.EMMA"):
        cfg.merge_from_other_cfg(CfgNode({"SOLVER": {"EMMA": {"ENABLED": True}}}))


@pytest.mark.parametrize(
    ("file", "options", "key", "value"),
    [
        ("timm/mask_rcnn_swin_tiny_FPN_3x", [], "BACKBONE.NAME", "build_timm_fpn_backbone"),
        ("paper/2e_mlp_2_hidden", [], "ROI_MASK_HEAD.NAME", "MLPMaskHead"),
        ("paper/2b_softmax", [], "ROI_MASK_HEAD.NAME", "SoftmaxMaskHead"),
        ("paper/2c_roi_warp_max", [], "ROI_BOX_HEAD.POOLER_TYPE", "ROIWarpMax"),
    ],
)
def test_a_part_without_counterpart_is_refused(
    file: str, options: list[str], key: str, value: str
) -> None:
    cfg = load_config(ROOT / f"configs/{file}.yaml", options)
    with pytest.raises(UserError, match=f"MODEL.{key} is '{value}'"):
        stock_config(cfg)


def test_parts_that_are_switched_off_need_no_counterpart() -> None:
    cfg = load_config(ROOT / "configs/paper/2e_mlp_2_hidden.yaml", ["MODEL.MASK_ON", "False"])
    assert stock_config(cfg).MODEL.ROI_HEADS.NAME == "StandardROIHeads"


def test_a_run_writes_a_stock_config_for_its_weights(trained: Path) -> None:
    cfg = detectron2_config()
    cfg.merge_from_file(str(trained / STOCK_CONFIG))
    assert Path(cfg.MODEL.WEIGHTS) == trained / "model_final.pth"
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and cfg.MODEL.DEVICE == "cpu"
    image = torch.randint(0, 255, (64, 64, 3)).numpy().astype("uint8")
    assert len(DefaultPredictor(cfg)(image)["instances"]) > 0


def test_a_run_without_counterpart_says_so_and_leaves_no_older_file(
    tiny_config: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / STOCK_CONFIG).write_text("of another model")
    keys = ["MODEL.ROI_HEADS.NAME", "FusedROIHeads", "MODEL.ROI_MASK_HEAD.NAME", "MLPMaskHead"]
    setup(default_argument_parser().parse_args(["--config-file", str(tiny_config), *keys]))
    assert not (output / STOCK_CONFIG).exists()
    (line,) = [t for t in (output / "log.txt").read_text().splitlines() if STOCK_CONFIG in t]
    assert "MLPMaskHead" in line and "MODEL.ROI_MASK_HEAD.NAME" in line
