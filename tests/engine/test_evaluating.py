"""TEST.OPTIMIZE: what is evaluated is a fast copy of the weights as they are."""

import json
from pathlib import Path

import pytest
import torch

from mask_rcnn_plus import UserError, load_config
from mask_rcnn_plus.engine import Trainer, main
from mask_rcnn_plus.engine.evaluating import for_evaluation
from mask_rcnn_plus.optimization import OptimizedRCNN

ENABLED = ["TEST.OPTIMIZE.ENABLED", "True"]


def test_the_copy_is_made_where_it_is_asked_for_and_of_the_weights_of_the_moment(
    tiny_config: Path,
) -> None:
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    cfg = load_config(tiny_config, classes)
    model = Trainer.build_model(cfg)
    assert for_evaluation(cfg, model) is model

    cfg = load_config(tiny_config, [*classes, *ENABLED, "TEST.OPTIMIZE.DTYPE", "bf16"])
    fast = for_evaluation(cfg, model)
    assert isinstance(fast, OptimizedRCNN) and fast.optimization_report.dtype == "bf16"
    assert for_evaluation(cfg, fast) is fast
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.fill_(7.0)
    assert fast.roi_heads.box_predictor.cls_score.bias.max() < 1
    later = for_evaluation(cfg, model)
    assert later.roi_heads.box_predictor.cls_score.bias.eq(7).all()

    cfg = load_config(tiny_config, [*classes, *ENABLED, "TEST.OPTIMIZE.DTYPE", "fp16"])
    with pytest.raises(UserError, match="take 'bf16'"):
        for_evaluation(cfg, model)


def test_a_run_evaluates_the_copy_and_trains_on(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["--config-file", str(tiny_config)]
    keys = ["TEST.EVAL_PERIOD", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    assert main([*run, *keys, *ENABLED]) == 0
    assert capsys.readouterr().out.count("The model is optimised for fp32 on cpu") == 2
    output = tmp_path / "output"
    trained = json.loads((output / "inference/shapes_val/metrics.json").read_text())
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path / "b")]
    assert main([*run, "--eval-only", *keys, *weights]) == 0
    plain = json.loads((tmp_path / "b/inference/shapes_val/metrics.json").read_text())
    for task in ("bbox", "segm"):
        assert trained[task] == pytest.approx(plain[task], abs=0.1, nan_ok=True)


@pytest.mark.parametrize("mode", [["--eval-only", "MODEL.WEIGHTS", "never_read.pth"], []])
def test_fp16_on_a_cpu_is_refused_before_anything_is_read(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: list[str]
) -> None:
    fp16 = ["TEST.OPTIMIZE.DTYPE", "fp16", "MODEL.DEVICE", "cpu"]
    folder = ["OUTPUT_DIR", str(tmp_path / "never_made")]
    assert main(["--config-file", str(tiny_config), *mode, *ENABLED, *fp16, *folder]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: TEST.OPTIMIZE.DTYPE is 'fp16'")
    assert err.count("\n") == 1 and not (tmp_path / "never_made").exists()
