"""mask-rcnn-plus stock-config: the same detections in detectron2 without the plugin."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg as detectron2_config
from detectron2.engine import DefaultPredictor

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.config.stock import write_stock_config
from mask_rcnn_tools.arguments import UsageError
from mask_rcnn_tools.stock_config.command import main

ROOT = Path(__file__).parents[2]
# detectron2 as compat repairs it; the plugin's package is not imported, so its heads do not exist.
STOCK = """if True:
    import sys
    from types import ModuleType

    package = ModuleType("mask_rcnn_plus")
    package.__path__ = [sys.argv[1] + "/mask_rcnn_plus"]
    sys.modules["mask_rcnn_plus"] = package
    from mask_rcnn_plus.compat import patches

    patches.apply()
    import numpy as np
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor

    cfg = get_cfg()
    cfg.merge_from_file(sys.argv[2])
    predict = DefaultPredictor(cfg)
    assert type(predict.model.roi_heads).__name__ == "StandardROIHeads"
    assert "mask_rcnn_plus.modeling" not in sys.modules
    found = predict(np.load(sys.argv[3]))["instances"]
    boxes = found.pred_boxes.tensor
    fields = {"scores": found.scores, "classes": found.pred_classes, "masks": found.pred_masks}
    np.savez(sys.argv[4], boxes=boxes, **fields)
"""


@pytest.mark.slow
def test_detectron2_without_the_plugin_finds_the_same(trained: Path, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    np.save(tmp_path / "image.npy", image)
    options = ["MODEL.ROI_HEADS.NAME", "FusedROIHeads"]
    options += ["MODEL.WEIGHTS", str(trained / "model_final.pth")]
    cfg = load_config(trained / "config.yaml", options)
    ours = DefaultPredictor(cfg)(image)["instances"]
    write_stock_config(cfg, tmp_path / "stock.yaml")
    files = [tmp_path / name for name in ("stock.yaml", "image.npy", "found.npz")]
    command = [sys.executable, "-c", STOCK, str(ROOT), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    theirs = np.load(tmp_path / "found.npz")
    assert len(ours) == len(theirs["scores"]) > 0
    assert np.abs(ours.scores.numpy() - theirs["scores"]).max() < 1e-5
    assert np.abs(ours.pred_boxes.tensor.numpy() - theirs["boxes"]).max() < 1e-3
    assert np.array_equal(ours.pred_classes.numpy(), theirs["classes"])
    assert np.array_equal(ours.pred_masks.numpy(), theirs["masks"])


def test_a_checkpoint_is_enough(trained: Path, tmp_path: Path) -> None:
    output, weights = tmp_path / "stock.yaml", trained / "model_final.pth"
    command = ["--weights", str(weights), "--output", str(output)]
    assert main(command) == 0
    cfg = detectron2_config()
    cfg.merge_from_file(str(output))
    assert Path(cfg.MODEL.WEIGHTS) == weights
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.MODEL.DEVICE in ("cpu", "cuda")
    with pytest.raises(UsageError, match=r"stock\.yaml exists"):
        main(command)
    with pytest.raises(UsageError, match="nothing"):
        main(["--weights", str(tmp_path / "nothing.pth"), "--output", str(tmp_path / "x.yaml")])
    assert not (tmp_path / "x.yaml").exists()


def test_a_model_without_counterpart_writes_nothing(trained: Path, tmp_path: Path) -> None:
    config = tmp_path / "mlp.yaml"
    head = "MODEL: {ROI_MASK_HEAD: {NAME: MLPMaskHead}}"
    config.write_text(f"_BASE_: {trained / 'config.yaml'}\n{head}\n")
    output = tmp_path / "stock.yaml"
    weights = ["--weights", str(trained / "model_final.pth"), "--config-file", str(config)]
    with pytest.raises(UserError, match="MLPMaskHead"):
        main([*weights, "--output", str(output)])
    assert not output.exists()
