"""Masks pasted into run lengths, against detectron2's paste and pycocotools' encoding."""

import os
import subprocess
import sys

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.layers import paste_masks_in_image

import mask_rcnn_plus  # noqa: F401  (makes detectron2 importable)
from mask_rcnn_plus.ops import backend, library, paste_masks_rle, run_lengths
from tests.memory import linux_only, run_alone

native_only = pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")


def expected(masks, boxes, size, threshold=0.5):
    pasted = paste_masks_in_image(masks, boxes, size, threshold)
    return [mask_util.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in pasted]


def blobs(count, side, generator):
    """Smooth probabilities, as from a mask head."""
    coarse = 6 * torch.randn(count, 1, 4, 4, generator=generator)
    size = (side, side)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear").sigmoid()[:, 0]


def any_masks(kind, count, side, generator):
    noise = torch.rand(count, side, side, generator=generator)
    if kind == "blobs":
        return blobs(count, side, generator)
    if kind == "noise":
        return noise
    if kind == "binary":
        return (noise > 0.5).float()
    return 0.5 + (noise - 0.5) * 1e-6  # "threshold": every sample within rounding of 0.5


def any_boxes(kind, count, size, generator):
    """Boxes as after detectron2's post-processing: within the image."""
    height, width = size
    limit = torch.tensor([width, height] * 2)
    ends = torch.rand(2, count, 2, generator=generator) * limit[:2]
    boxes = torch.cat([ends.amin(0), ends.amax(0)], dim=1)
    if kind == "full":
        boxes[:] = torch.tensor([0.0, 0, width, height])
    elif kind == "sub-pixel":
        boxes[:, 2:] = boxes[:, :2] + 1.5 * torch.rand(count, 2, generator=generator)
    elif kind == "clipped":
        boxes = boxes + torch.tensor([-width, -height, width, height]) / 2
    elif kind == "whole pixels":
        boxes = boxes.round()
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return boxes.clamp(min=0).minimum(limit)


@pytest.fixture(params=["native", "fallback"])
def either(request, monkeypatch):
    """The compiled operator, and its fallback."""
    if request.param == "native" and backend() != "native":
        pytest.skip("the operators are not compiled")
    if request.param == "fallback":
        monkeypatch.setitem(library._failures, "cpu", "disabled by a test")
        monkeypatch.setattr(library, "_warned", {"cpu"})


BOXES = ["random", "clipped", "sub-pixel", "full", "whole pixels"]
SIZES = [(1, 1), (1, 37), (50, 41), (130, 200)]


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("masks", ["blobs", "noise", "binary", "threshold"])
def test_bytes_equal_paste_and_encode(either, masks, boxes):
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        for side in (1, 7, 28):
            small = any_masks(masks, 6, side, generator)
            where = any_boxes(boxes, 6, size, generator)
            for threshold in (0.5, 0.3):
                out = paste_masks_rle(small, where, size, threshold)
                assert out == expected(small, where, size, threshold)


def test_case_computed_by_hand(either):
    # One cell in a box of two pixels: values 0.75 * 0.75 in the box, and 0.75 * 0.25 around it.
    out = paste_masks_rle(torch.ones(1, 1, 1), torch.tensor([[1.0, 1, 3, 3]]), (4, 5))
    # Runs 5, 2, 2, 2, 9; the last two are stored as differences from the last but one.
    assert out == [{"size": [4, 5], "counts": b"52207"}]
    small, where = torch.ones(1, 1, 1), torch.tensor([[1.0, 1, 3, 3]])
    (none,) = paste_masks_rle(small, where, (4, 5), threshold=0.6)
    assert none["counts"] == b"d0"  # 20 zeros: 16 + 4 and more, then 0


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "box",
    [
        (3, 3, 3, 9),
        (3, 3, 3, 3),
        (5.2, 3, 4.9, 9),
        (9, 9, 2, 2),
        (-50, 2, -20, 9),
        (40, 2, 60, 9),
        (2, 2, -5, 9),
        (NAN, 2, 8, 9),
        (2, 2, 8, NAN),
        (-INF, -INF, INF, INF),
        (3e38, 0, 3e38, 9),
    ],
)
def test_empty_and_invalid_boxes_give_an_empty_mask(either, box):
    out = paste_masks_rle(torch.ones(2, 4, 4), torch.tensor([box, (1.0, 2, 9, 8)]), (12, 15))
    assert mask_util.area(out).tolist() == [0, 48]
    assert out[0]["counts"] == mask_util.encode(np.zeros((12, 15), np.uint8, order="F"))["counts"]


def test_boxes_are_cut_at_the_border(either):
    generator = torch.Generator().manual_seed(1)
    small = blobs(8, 14, generator)
    where = torch.tensor([[-30.5, -8, 20, 31], [10, 10.2, 90, 77], [-9, -9, 60, 70], [0, 0, 9, 9]])
    where = where.repeat(2, 1)
    whole = paste_masks_in_image(small, where + 100, (300, 300))[:, 100:140, 100:150]
    ours = mask_util.decode(paste_masks_rle(small, where, (40, 50)))
    # Far from the origin, fp32 rounds the positions of samples differently.
    assert np.mean(ours.transpose(2, 0, 1) != whole.numpy()) < 1e-3
    assert paste_masks_rle(small, where, (40, 50)) == expected(small, where, (40, 50))


def test_threshold_zero_includes_all_sampled_pixels(either):
    generator = torch.Generator().manual_seed(2)
    small = any_masks("binary", 8, 5, generator)
    where = any_boxes("random", 8, (30, 40), generator)
    where[0] = torch.tensor([4.0, 4, 4, 9])
    assert paste_masks_rle(small, where, (30, 40), 0) == expected(small, where, (30, 40), 0)


def test_non_finite_values_do_not_spread(either):
    generator = torch.Generator().manual_seed(3)
    small = any_masks("binary", 6, 9, generator)
    small[:, 2, 3], small[:, 6, 6], small[:, 1, 7] = NAN, INF, -INF
    where = any_boxes("random", 6, (60, 60), generator)
    assert paste_masks_rle(small, where, (60, 60)) == expected(small, where, (60, 60))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool])
def test_other_dtypes_are_converted_to_fp32(either, dtype):
    generator = torch.Generator().manual_seed(4)
    small = blobs(5, 28, generator).to(dtype)
    where = any_boxes("random", 5, (80, 70), generator)
    out = paste_masks_rle(small, where.double(), (80, 70))
    assert out == expected(small.float(), where, (80, 70))


def test_strided_and_non_square_masks(either):
    generator = torch.Generator().manual_seed(5)
    small = torch.rand(4, 6, 12, generator=generator)
    where = any_boxes("random", 4, (50, 60), generator)
    turned = paste_masks_rle(small.transpose(1, 2), where[:, [1, 0, 3, 2]], (60, 50))
    ours = mask_util.decode(paste_masks_rle(small, where, (50, 60)))
    # Transposing swaps two of the four products in the sum.
    assert np.mean(mask_util.decode(turned).transpose(1, 0, 2) != ours) < 1e-3


def test_no_masks(either):
    assert paste_masks_rle(torch.zeros(0, 28, 28), torch.zeros(0, 4), (9, 9)) == []


@pytest.mark.parametrize(
    ("masks", "boxes", "size", "threshold", "message"),
    [
        ((2, 1, 28, 28), (2, 4), (9, 9), 0.5, r"masks must have shape \(R, M, M\)"),
        ((2, 0, 28), (2, 4), (9, 9), 0.5, "masks must have shape"),
        ((2, 28, 28), (3, 4), (9, 9), 0.5, r"boxes must have shape \(2, 4\)"),
        ((2, 28, 28), (2, 5), (9, 9), 0.5, "boxes must have shape"),
        ((2, 28, 28), (2, 4), (0, 9), 0.5, r"image_size must be .* got \(0, 9\)"),
        ((2, 28, 28), (2, 4), (2**20, 2**20), 0.5, "less than 2"),
        ((2, 28, 28), (2, 4), (9, 9), -1, "threshold must be 0 or more, got -1"),
        ((2, 28, 28), (2, 4), (9, 9), NAN, "threshold must be 0 or more, got nan"),
    ],
)
def test_refusals(masks, boxes, size, threshold, message):
    with pytest.raises(ValueError, match=message):
        paste_masks_rle(torch.zeros(masks), torch.zeros(boxes), size, threshold)


@native_only
def test_thread_count_does_not_change_the_result():
    generator = torch.Generator().manual_seed(6)
    small = blobs(40, 28, generator)
    where = any_boxes("random", 40, (200, 300), generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results += [paste_masks_rle(small, where, (200, 300)) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert all(result == results[0] for result in results)


@native_only
def test_opcheck():
    arguments = (torch.rand(3, 5, 5), torch.tensor([[1.0, 2, 9, 9]] * 3), 12, 14, 0.5, True)
    torch.library.opcheck(torch.ops.mask_rcnn_plus.paste_masks_rle, arguments)


@pytest.mark.parametrize("pixels", [[], [0], [9], [0, 9], [3, 4, 5], list(range(10))])
def test_counts_with_runs_at_the_borders(pixels):
    image = np.zeros((5, 2), np.uint8, order="F")
    image.ravel(order="K")[pixels] = 1
    begins, ends = np.array(pixels, np.int64), np.array(pixels, np.int64) + 1
    assert run_lengths.encode(begins, ends, 10) == mask_util.encode(image)["counts"]


# In a subprocess: both torch and the operators choose their instruction set once.
PARITY = """
import torch, mask_rcnn_plus
from tests.ops.test_mask_rle import BOXES, any_boxes, any_masks, expected, paste_masks_rle
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(7)
for kind in ("noise", "threshold"):
    for boxes in BOXES:
        small = any_masks(kind, 8, 28, generator)
        where = any_boxes(boxes, 8, (90, 140), generator)
        out = paste_masks_rle(small, where, (90, 140))
        assert out == expected(small, where, (90, 140)), (kind, boxes)
"""


@pytest.mark.slow
@native_only
@pytest.mark.parametrize(
    ("torch_isa", "ours"), [("default", "baseline"), ("avx2", "baseline"), ("avx2", "avx2")]
)
def test_every_instruction_set_rounds_like_torch(torch_isa, ours):
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARITY],
        env=os.environ
        | {"ATEN_CPU_CAPABILITY": torch_isa, "MASK_RCNN_PLUS_CPU_ISA": ours}
        | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr


# 300 masks of 4000 x 3000 pixels would take 3.4 GiB.
MEMORY = """
import torch
from mask_rcnn_plus.ops import paste_masks_rle
from tests.memory import extra
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
coarse = 6 * torch.randn(300, 1, 4, 4, generator=generator)
masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear").sigmoid()[:, 0]
ends = torch.rand(2, 300, 2, generator=generator) * torch.tensor([4000, 3000])
boxes = torch.cat([ends.amin(0), ends.amax(0)], dim=1)
paste_masks_rle(masks[:1], boxes[:1], (3000, 4000))
print(extra(lambda: paste_masks_rle(masks, boxes, (3000, 4000))))
"""


@pytest.mark.slow
@linux_only
@native_only
def test_memory_is_proportional_to_the_runs():
    assert float(run_alone(MEMORY)) < 24
