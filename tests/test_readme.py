"""The README's commands and script, as they stand there."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor

from mask_rcnn_plus import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_app_script_predicts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script, faster = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(script.strip().splitlines()) <= 10
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "balloons").symlink_to(trained)
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.random.default_rng(0).integers(0, 255, (90, 70, 3)))
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    exec(script, variables)
    assert variables["instances"].image_size == (90, 70)
    assert variables["instances"].pred_masks.shape[1:] == (90, 70)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(" pixels")]
    assert len(lines) == len(variables["instances"]) > 0
    assert {line.split()[0] for line in lines} <= {"circle", "square", "triangle"}

    cfg = load_config("output/balloons/config.yaml")
    cfg.MODEL.WEIGHTS = "output/balloons/model_final.pth"
    variables["predictor"] = DefaultPredictor(cfg)
    exec(faster, variables)
    assert "optimised for bf16 on cpu" in capsys.readouterr().out
    found = variables["predictor"](cv2.imread("photo.jpg"))["instances"]
    assert found.image_size == (90, 70) and found.pred_masks.dtype == torch.bool


def test_what_the_readme_names_exists() -> None:
    for path in re.findall(r"\]\(([\w./-]+)\)|--config-file (configs/[\w./-]+)", README):
        assert (ROOT / (path[0] or path[1])).is_file(), path
    tree = README.split("## Architecture")[1].split("```")[1]
    for line in tree.splitlines():
        name = re.match(r"  ([\w.]+/?) ", line)
        if name:
            assert (ROOT / "mask_rcnn_plus" / name[1]).exists(), name[1]
