"""The README's commands and script, unchanged."""

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
PERFORMANCE = (ROOT / "docs/performance.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("datasets/README.md", "configs/README.md", "SECURITY.md")),
    ROOT / "docs/ablations/README.md",
]


def test_the_app_script_predicts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    script, stock = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (faster,) = re.findall(r"```python\n(.*?)```", PERFORMANCE, re.DOTALL)
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

    exec(stock, variables)
    found = variables["predictor"](cv2.imread("photo.jpg"))["instances"]
    assert len(found) == len(variables["instances"])

    cfg = load_config("output/balloons/config.yaml")
    cfg.MODEL.WEIGHTS = "output/balloons/model_final.pth"
    variables["predictor"] = DefaultPredictor(cfg)
    exec(faster, variables)
    assert "optimized for bf16 on cpu" in capsys.readouterr().out
    found = variables["predictor"](cv2.imread("photo.jpg"))["instances"]
    assert found.image_size == (90, 70) and found.pred_masks.dtype == torch.bool


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_configs_of_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (page.parent / link).exists(), link
    for config in re.findall(r"--config-file (configs/[\w./-]+)", text):
        assert (ROOT / config).is_file(), config


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs/README.md"
    linked = {
        (index.parent / link).resolve()
        for link in re.findall(r"\]\(([\w./-]+)\)", index.read_text())
    }
    pages = {path.resolve() for path in (ROOT / "docs").rglob("*.md") if path.name != "table.md"}
    assert pages - {index.resolve()} <= linked


def test_the_tree_of_the_architecture_page_exists() -> None:
    tree = (ROOT / "docs/architecture.md").read_text().split("```")[1]
    parents: list[str] = []
    for line in tree.strip().splitlines():
        indent, name = re.match(r"( *)([\w./-]+)", line).groups()
        if len(indent) > 2:  # the rest of a description
            continue
        parents = [*parents[: len(indent) // 2], name]
        assert (ROOT / "/".join(part.rstrip("/") for part in parents)).exists(), line


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1000
