"""Run lengths against pycocotools, on random and awkward masks."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from mask_rcnn_plus.ops.run_lengths import crop, decode, placed, window_of


def encode(mask: np.ndarray) -> dict:
    return mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))


def masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    result = [rng.random((h, w)) < p for h, w, p in ((7, 5, 0.5), (40, 33, 0.9), (1, 9, 0.4))]
    wide = np.zeros((300, 400), bool)
    wide[250:, 10:350] = True
    tall = np.zeros((50, 60), bool)
    tall[:, 20:40] = True  # one run over twenty columns
    return [*result, wide, tall, np.zeros((4, 6), bool), np.ones((4, 6), bool), wide[::-1, ::-1]]


@pytest.mark.parametrize("mask", masks())
def test_decoded_runs_are_the_ones_of_the_mask(mask: np.ndarray) -> None:
    rle = encode(mask)
    flat = np.zeros(mask.size, bool)
    for begin, end in zip(*decode(rle), strict=True):
        flat[begin:end] = True
    assert (flat.reshape(mask.shape, order="F") == mask).all()
    assert np.array_equal(decode({**rle, "counts": rle["counts"].decode()})[0], decode(rle)[0])


@pytest.mark.parametrize("mask", masks())
def test_windows_and_crops_equal_the_decoded_mask(mask: np.ndarray) -> None:
    rle = encode(mask)
    x, y, w, h = mask_util.toBbox(rle).astype(int).tolist()
    assert window_of(rle) == (x, y, x + w, y + h) or not mask.any()
    height, width = mask.shape
    assert (crop(rle, (0, 0, width, height)) == mask).all()
    window = (width // 3, height // 4, max(width // 3 + 1, width - 1), height)
    assert (crop(rle, window) == mask[window[1] : window[3], window[0] : window[2]]).all()
    assert crop(rle, (2, 0, 2, 1)).shape == (1, 0)


@pytest.mark.parametrize("mask", masks())
def test_mask_of_a_tile_in_the_image(mask: np.ndarray) -> None:
    height, width = mask.shape
    for corner, size in (((0, 0), (height, width)), ((3, 2), (height + 2, width + 9))):
        image = np.zeros(size, np.uint8)
        image[corner[1] : corner[1] + height, corner[0] : corner[0] + width] = mask
        assert placed(encode(mask), corner, size) == encode(image)
