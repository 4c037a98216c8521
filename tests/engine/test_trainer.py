"""The trainer builds the optimizer of its config."""

from pathlib import Path

import torch

from mask_rcnn_plus import load_config
from mask_rcnn_plus.engine import Trainer


def test_the_config_chooses_the_optimizer(tiny_config: Path) -> None:
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "SOLVER.WEIGHT_DECAY_NORM", "0.0"]
    cfg = load_config(tiny_config, keys)
    model = Trainer.build_model(cfg)
    assert type(Trainer.build_optimizer(cfg, model)).__name__.startswith("SGD")

    keys += ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", "0.002", "SOLVER.WEIGHT_DECAY", "0.05"]
    optimizer = Trainer.build_optimizer(load_config(tiny_config, keys), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    settings = {
        parameter: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    stem = model.backbone.bottom_up.stem.conv1
    assert settings[stem.weight] == (0.002, 0.05)
    assert settings[stem.norm.weight] == (0.002, 0.0)
    assert len(settings) == len(list(model.parameters()))
