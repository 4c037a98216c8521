"""Every YAML in configs/: what it builds trains and predicts, and it says no more than it must."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mask_rcnn_plus import get_cfg, load_config
from tests.shrink import batch, calm, shrink

CONFIGS = Path(__file__).parents[1] / "configs"
every_config = pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)


@every_config
def test_it_trains_and_predicts(path: Path) -> None:
    cfg = shrink(load_config(path))
    torch.manual_seed(0)
    model = calm(build_model(cfg))
    inputs = batch(cfg)
    with EventStorage():
        losses = model(inputs)
    wanted = {
        "loss_cls": True,
        "loss_mask": cfg.MODEL.MASK_ON,
        "loss_keypoint": cfg.MODEL.KEYPOINT_ON,
    }
    for part, on in wanted.items():
        assert any(part in name for name in losses) == on, losses.keys()
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    sum(losses.values()).backward()
    parts = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if parameter.grad.any():
                parts.add(name.split(".")[0])
    assert parts >= {"backbone", "roi_heads"}, parts

    model.eval()
    with torch.no_grad():
        (found,) = (output["instances"] for output in model(inputs[:1]))
    assert found.pred_boxes.tensor.shape == (len(found), 4)
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON
    assert found.has("pred_keypoints") == cfg.MODEL.KEYPOINT_ON
