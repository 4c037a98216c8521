"""The check handles any json; what it accepts or repairs is safe for the reader and pycocotools."""

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from mask_rcnn_plus.data.coco_json import outline_fault, read_coco_json
from mask_rcnn_plus.errors import UserError
from mask_rcnn_tools.check.json_checks import inspect
from mask_rcnn_tools.check.problems import is_error
from mask_rcnn_tools.check.repair import repair_content
from mask_rcnn_tools.check.result import CheckResult, describe

from .conftest import VALID

BOUNDED = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
NUMBERS = st.one_of(
    st.integers(-3, 60),
    st.floats(),
    st.sampled_from([0, 1, 2, 5, 6, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0]),
)
LEAVES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.sampled_from(["1,2 3,4 9,9", "[[1, 2], [3, 4], [9, 9]]", '{"counts": [1]}']),
    st.sampled_from(["\ud800", "\x1b[31m", "1", "nan", "~~", "a\0b", "../a", "PPPPPPPPPPP0"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=9),
        st.lists(NUMBERS, max_size=12),
        st.lists(st.lists(NUMBERS, min_size=2, max_size=2), max_size=4),
        st.fixed_dictionaries({"x": inner, "y": inner}),
        st.dictionaries(
            st.sampled_from(["id", "size", "counts", "bbox", "name"]), inner, max_size=3
        ),
    ),
    max_leaves=12,
)
FIELDS = {
    "images": ["id", "file_name", "height", "width"],
    "categories": ["id", "name", "keypoints", "skeleton"],
    "annotations": [
        *("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"),
        *("keypoints", "attributes"),
    ],
}
PLACES = st.sampled_from([(section, field) for section in FIELDS for field in FIELDS[section]])
DAMAGED = st.lists(st.tuples(PLACES, st.integers(0, 2), VALUES), min_size=1, max_size=4)


def damage(changes: list[tuple[tuple[str, str], int, Any]]) -> dict[str, Any]:
    content = deepcopy(VALID)
    for (section, field), place, value in changes:
        entries = content[section]
        entries[place % len(entries)][field] = value
    return content


@BOUNDED
@given(VALUES)
def test_any_json(value: Any) -> None:
    for content in (value, {**VALID, "annotations": [value]}, {**VALID, "images": [value, value]}):
        json.dumps(inspect(content))


@BOUNDED
@given(DAMAGED)
def test_the_reader_and_pycocotools_accept_what_the_check_accepts(changes: Any) -> None:
    content = damage(changes)
    before = deepcopy(content)
    inspection = inspect(content)
    assert repr(content) == repr(before)
    for problem in inspection.problems:
        text = describe(problem)
        assert text.isprintable() and len(text) < 1500, text
        text.encode()
    result = CheckResult(
        "x", Path("x"), Path("x"), "", 2, 3, inspection.classes, inspection.problems
    )
    result.text(width=100).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        if not any(map(is_error, inspection.problems)):
            path.write_text(json.dumps(content))
            rasterise(path)
        if outline_fault(content):
            return
        repaired = repair_content(content, inspection.problems, {})
        assert all(p.kind in ("no-images", "no-coco") for p in repaired.left), repaired.left
        if not repaired.left:
            path.write_text(repaired.text())
            rasterise(path)


@BOUNDED
@given(DAMAGED)
def test_pycocotools_accepts_what_the_reader_accepts(changes: Any) -> None:
    """With DATA_CHECK off, only the reader checks the json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.json")
        path.write_text(json.dumps(damage(changes)))
        try:
            read_coco_json(path)
        except UserError as error:
            assert "\n" not in str(error)
            return
        rasterise(path, ignore=Exception)


def rasterise(path: Path, ignore: Any = ()) -> None:
    """Reads a json like the reader and the evaluators, and decodes all masks."""
    read_coco_json(path)
    coco = COCO(str(path))
    for annotation in coco.anns.values():
        if annotation.get("segmentation"):
            try:
                mask = coco.annToMask(annotation)
            except ignore:
                continue
            image = coco.imgs[annotation["image_id"]]
            assert mask.shape == (image["height"], image["width"])


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """pycocotools prints to the screen."""
