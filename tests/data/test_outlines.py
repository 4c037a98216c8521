"""Converts masks to polygons and, with pycocotools, back."""

from itertools import combinations

import numpy as np
import pycocotools.mask as mask_util

from mask_rcnn_plus.data.outlines import mask_to_polygons


def mask_of(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    return mask_util.decode(mask_util.merge(mask_util.frPyObjects(polygons, *size))).astype(bool)


def test_outlines_reproduce_any_mask() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        size = tuple(rng.integers(1, 24, 2).tolist())
        mask = rng.random(size) < rng.random()
        polygons = mask_to_polygons(mask)
        if not mask.any():
            assert polygons == []
            continue
        assert np.array_equal(mask_of(polygons, size), mask)
        for polygon in polygons:
            x, y = np.reshape(polygon, (-1, 2)).T
            turns = np.sign(np.diff([*x, x[0]])) * np.sign(np.diff([*y, y[0]]))
            sides = np.diff([*x, x[0], x[1]]) != 0
            assert not turns.any()  # along pixel edges ...
            assert (sides[:-1] != sides[1:]).all()  # ... and no vertex on a straight line
        for first, second in combinations([mask_of([p], size) for p in polygons], 2):
            assert not (first & second).any()


def test_outlines_calculated_by_hand() -> None:
    mask = np.zeros((5, 6), dtype=bool)
    mask[1:3, 2:5] = True
    assert mask_to_polygons(mask) == [[2.0, 1.0, 5.0, 1.0, 5.0, 3.0, 2.0, 3.0]]
    mask[1, 4] = False
    assert mask_to_polygons(mask) == [[2, 1, 4, 1, 4, 2, 5, 2, 5, 3, 2, 3]]
    assert all(type(value) is float for value in mask_to_polygons(mask)[0])

    ring = np.ones((5, 5), dtype=bool)
    ring[2, 2] = False
    polygons = mask_to_polygons(ring)
    assert len(polygons) == 2
    assert np.array_equal(mask_of(polygons, (5, 5)), ring)

    ring[3, 3] = ring[4, 4] = False  # now the hole is open to the outside, across a corner
    assert len(mask_to_polygons(ring)) == 1
    assert np.array_equal(mask_of(mask_to_polygons(ring), (5, 5)), ring)

    touching = np.eye(2, dtype=bool)
    assert sorted(mask_to_polygons(touching)) == [
        [0, 0, 1, 0, 1, 1, 0, 1],
        [1, 1, 2, 1, 2, 2, 1, 2],
    ]
