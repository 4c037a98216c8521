"""Boxes and areas of masks, compared with pycocotools and by hand; the fit of anchors."""

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_rcnn_plus.data.mask_rules import rle_fault
from mask_rcnn_tools.check.masks import measure_polygons, measure_rles
from mask_rcnn_tools.check.statistics import AnchorSettings, anchor_fit, box_lines


def count_runs(mask: np.ndarray) -> list[int]:
    """A mask's run lengths, counted one pixel at a time."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def test_measures_of_run_lengths_equal_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    rles: list[dict[str, Any]] = []
    masks, sizes = [], []
    for number in range(60):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98, 0.0, 1.0])
        rle: dict[str, Any] = {"size": [height, width], "counts": count_runs(mask)}
        if number % 3:
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            rle["counts"] = rle["counts"].decode()
        rles.append(rle)
        masks.append(mask)
        sizes.append((height, width))
    faults, boxes, areas = measure_rles(rles, sizes)
    assert faults == [""] * 60
    assert areas.tolist() == [mask.sum() for mask in masks]
    for mask, box in zip(masks, boxes, strict=True):
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert box.tolist() == [
                *(columns.min(), rows.min()),
                *(columns.max() + 1, rows.max() + 1),
            ]
        else:
            assert np.isnan(box).all()


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(alphabet=[chr(code) for code in range(46, 114)], max_size=12),
            st.lists(st.integers(-3, 12), max_size=6),
            st.sampled_from(["\u00e9", "<", "`000000000000000000", "PPPPPPP0", None, 3]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_many_run_lengths_at_once_have_the_same_faults_as_one_by_one(counts: list[Any]) -> None:
    rles = [{"size": [2, 6], "counts": value} for value in counts]
    faults, _, areas = measure_rles(rles, [(2, 6)] * len(rles))
    assert faults == [rle_fault(rle, [2, 6]) for rle in rles]
    for rle, fault, area in zip(rles, faults, areas, strict=True):
        if not fault:
            good = rle
            if isinstance(rle["counts"], list):
                good = mask_util.frPyObjects(rle, 2, 6)
            assert mask_util.decode(good).sum() == area


def test_a_negative_run_length_is_a_fault() -> None:
    # One character each for 10, -2 and 4; their sum is the 12 pixels of the image.
    faults, _, areas = measure_rles([{"size": [2, 6], "counts": ":N4"}], [(2, 6)])
    assert "not run lengths" in faults[0] and areas.tolist() == [0]


def test_polygons_are_measured() -> None:
    triangle = [10.0, 20, 30, 20, 10, 40]
    far_square = [900_000, 900_000, 900_002, 900_000, 900_002, 900_002, 900_000, 900_002]
    faults, boxes, areas = measure_polygons(
        [[triangle, [0, 0, 4, 0, 4, 5, 0, 5]], [far_square], [[1, 1, 2, 2, 3, 3]]],
        [(50, 60), (10**6, 10**6), (50, 60)],
    )
    assert boxes[0].tolist() == [0, 0, 30, 40]
    assert areas[:2].tolist() == [220, 4]
    assert [fault[:2] for fault in faults] == [(2, "polygon-flat")] and np.isnan(boxes[2]).all()


def test_anchors_are_compared_after_resizing() -> None:
    anchors = AnchorSettings(sizes=[32, 64], ratios=[0.5, 1.0, 2.0], min_size=200, max_size=300)
    # The image of 100 x 100 is scaled by 2, that of 400 x 100 by 0.75 (its longer side is limited).
    fits = anchor_fit([(32, 32, 100, 100), (8, 8, 100, 100), (64, 64, 400, 100)], anchors)
    assert fits.tolist() == pytest.approx([1.0, 16 * 16 / 32**2, 48 * 48 / 64**2])
    lines = "\n".join(box_lines([(8, 8, 100, 100)] * 10, anchors))
    assert "side 8 / 8 / 8 px" in lines and "100% small" in lines
    assert "below 0.5 for 100% of the boxes" in lines and "SIZES are 32 to 64" in lines
    assert box_lines([], anchors) == []
