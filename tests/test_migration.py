"""docs/migration.md: its keys exist and have the stated defaults."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import mask_rcnn_plus

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/migration.md").read_text()
KEY = re.compile(r"`([A-Z_]+(?:\.[A-Z_]+)+)\b[^`]*`")


def _rows() -> list[tuple[list[str], list[str]]]:
    rows = []
    for line in PAGE.splitlines():
        cells = line.split(" | ")
        if len(cells) == 4 and KEY.search(cells[1]):
            keys = KEY.findall(cells[1])
            values = re.findall(r"`([^`]*)`", cells[2])
            rows.append((keys, values))
    return rows


def _value(cfg: Any, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _parsed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("keys", "values"), _rows(), ids=lambda cell: ",".join(cell)[:60])
def test_defaults_are_as_stated(keys: list[str], values: list[str]) -> None:
    cfg = mask_rcnn_plus.get_cfg()
    assert len(values) >= len(keys)
    for key, value in zip(keys, values, strict=False):
        assert _plain(_value(cfg, key)) == _parsed(value), key


def test_every_key_of_the_page_exists() -> None:
    cfg = mask_rcnn_plus.get_cfg()
    keys = set(KEY.findall(PAGE))
    assert len(keys) > 30
    for key in keys:
        _value(cfg, key)


def test_the_values_of_r_50_fpn_are_as_stated() -> None:
    cfg = mask_rcnn_plus.load_config(ROOT / "configs/coco/mask_rcnn_R_50_FPN_1x.yaml")
    for key, value in re.findall(
        r"`([A-Z_.]+)` \| `[^`]*`(?: \(C4\))?; R-50-FPN: `?([\d.]+)\b", PAGE
    ):
        assert _value(cfg, key) == ast.literal_eval(value), key
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.IMS_PER_BATCH) == (0.02, 16)
    assert cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO == 0
