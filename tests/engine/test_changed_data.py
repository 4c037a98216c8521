"""--resume with changed data, and training from weights that fit partly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mask_rcnn_plus.engine import main
from mask_rcnn_plus.engine.checkpoint import Checkpointer
from mask_rcnn_plus.engine.checks import log_changes
from mask_rcnn_plus.errors import UserError
from tests.conftest import TINY


@pytest.fixture
def data(tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data sets whose json files a test may edit."""
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root / "shapes"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


def rename(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(coco: dict[str, Any]) -> None:
        for category, name in zip(coco["categories"], names, strict=True):
            category["name"] = name

    return change


def one_image_less(coco: dict[str, Any]) -> None:
    gone = coco["images"].pop()["id"]
    coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] != gone]


def test_resume_refuses_other_classes_and_reports_other_changes(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "output", ignore=shutil.ignore_patterns(".lock"))
    config = tmp_path / "tiny.yaml"
    tiny = {**TINY, "OUTPUT_DIR": str(tmp_path / "output"), "SOLVER": {**TINY["SOLVER"]}}
    tiny["SOLVER"]["MAX_ITER"] = 3
    config.write_text(yaml.safe_dump(tiny))
    command = ["--config-file", str(config), "--resume", "DATASETS.TEST", "()"]
    files = [data / "train.json", data / "val.json"]

    for path in files:
        edit(path, rename("square", "circle", "triangle"))
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "number 0 was 'circle' and is 'square'" in message and message.count("\n") == 1

    for path in files:
        edit(path, rename("circle", "square", "triangle"))
    edit(files[0], one_image_less)
    assert main(command) == 0
    line = next(ln for ln in capsys.readouterr().out.splitlines() if "the data have changed" in ln)
    assert "3 training images instead of 4" in line
    assert "content of DATASETS.TRAIN 'shapes_train' is different" in line
    assert "DATASETS.TEST 'shapes_val' is no longer used" in line
    # The new checkpoint has the new data.
    assert main([*command, "SOLVER.MAX_ITER", "4"]) == 0
    assert "the data have changed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "before", "now", "expected"),
    [
        ("class_names", ["a", "b"], ["b", "a"], "number 0 was 'a' and is 'b' (2 before, 2 now)"),
        ("class_names", ["a"], ["a", "b"], "number 1 was missing and is 'b'"),
        ("class_names", ["a", "b"], ["a"], "number 1 was 'b' and is missing"),
        ("keypoint_names", ["l", "r"], ["r", "l"], "keypoints of DATASETS.TRAIN"),
    ],
)
def test_other_names_are_refused(
    tmp_path: Path, key: str, before: list[str], now: list[str], expected: str
) -> None:
    model = torch.nn.Linear(1, 1)
    first = Checkpointer(model, str(tmp_path), **{key: before})
    first.save("model", iteration=0)
    assert first.resume_or_load("", resume=True)["iteration"] == 0
    second = Checkpointer(model, str(tmp_path), **{key: now})
    with pytest.raises(UserError) as refusal:
        second.resume_or_load("", resume=True)
    assert expected in str(refusal.value)
    # Its weights may start another run.
    Checkpointer(model, **{key: now}).load(str(tmp_path / "model.pth"))


def test_a_checkpoint_without_digests_resumes_silently(caplog: pytest.LogCaptureFixture) -> None:
    log_changes(None, {"training images": 3})
    log_changes({"training images": 3}, {"training images": 3})
    assert not caplog.records


def test_weights_that_fit_partly_are_reported_in_one_sentence(
    trained: Path, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(trained / "model_final.pth", weights_only=True)
    weights = checkpoint["model"]
    total = sum(not name.endswith("num_batches_tracked") for name in weights)
    weights["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(9, 16)
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    del weights["backbone.fpn_lateral2.weight"]
    weights["unknown.weight"] = torch.zeros(1)
    torch.save({"model": weights}, tmp_path / "other.pth")
    command = ["--config-file", str(tiny_config), "DATASETS.TEST", "()", "SOLVER.MAX_ITER", "1"]
    assert main([*command, "MODEL.WEIGHTS", str(tmp_path / "other.pth")]) == 0
    screen = capsys.readouterr().out
    line = next(line for line in screen.splitlines() if "parameters loaded" in line)
    assert f"{total - 3} of {total} parameters loaded" in line
    assert "roi_heads.box_predictor (2 of 4)" in line and "backbone.fpn_lateral2 (1 of 2)" in line
    log = (tmp_path / "output" / "log.txt").read_text()
    for name in ("roi_heads.box_predictor.cls_score.weight", "unknown.weight"):
        assert name not in screen and name in log
