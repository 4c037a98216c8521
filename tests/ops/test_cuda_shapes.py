"""Tests that need a GPU: unusual numbers of channels and RoIs, and a capture as the first call."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ops import test_cuda
from tests.ops.test_cuda import DTYPES, LAYOUTS, TOLERANCE, random_boxes, random_like, random_maps

pytestmark = test_cuda.pytestmark
operators = torch.ops.mask_rcnn_plus


def assert_equal_to_the_cpu(maps, boxes, bins=7):
    channels_last = maps[0].is_contiguous(memory_format=torch.channels_last)
    rest = test_cuda.settings(channels_last)
    results = []
    for device in ("cpu", "cuda"):
        features, rois = [m.to(device) for m in maps], boxes.to(device)
        out = operators.fpn_roi_align(features, rois, bins, bins, *rest)
        grad = random_like(out)
        sizes = test_cuda.sizes_of(maps)
        results.append([out, *operators.fpn_roi_align_backward(grad, rois, sizes, *rest)])
    for a, b in zip(*results, strict=True):
        tolerance = TOLERANCE[a.dtype] * a.double().abs().max()
        assert (a.double() - b.cpu().double()).abs().max() <= tolerance


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("channels", [83, 41, 1])
def test_ragged_numbers_of_channels(channels, dtype, channels_last):
    maps = random_maps(channels_last, dtype, channels, device="cpu")
    assert_equal_to_the_cpu(maps, random_boxes(60, dtype, device="cpu"))


@LAYOUTS
def test_one_roi(channels_last):
    maps = random_maps(channels_last, device="cpu")
    assert_equal_to_the_cpu(maps, random_boxes(1, device="cpu"))


@LAYOUTS
def test_hundred_thousand_rois(channels_last):
    maps = random_maps(channels_last, channels=8, device="cpu")
    assert_equal_to_the_cpu(maps, random_boxes(100_000, device="cpu"), bins=2)


@LAYOUTS
@pytest.mark.parametrize("count", [1000, 100_000])
def test_all_rois_in_a_single_cell(count, channels_last):
    boxes = torch.tensor([[1.0, 41, 37, 43, 39]]).repeat(count, 1)
    assert_equal_to_the_cpu(random_maps(channels_last, channels=8, device="cpu"), boxes, bins=2)


FIRST_CAPTURE = """
import torch
import mask_rcnn_plus.ops
from tests.ops.test_cuda import operators, random_boxes, random_maps, settings, sizes_of
maps, boxes, rest = random_maps(True), random_boxes(), settings(True)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
    grads = operators.fpn_roi_align_backward(out, boxes, sizes_of(maps), *rest)
graph.replay()
expected = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
assert torch.equal(out, expected)
for a, b in zip(grads, operators.fpn_roi_align_backward(out, boxes, sizes_of(maps), *rest)):
    assert torch.equal(a, b)
"""


def test_first_call_of_a_process_can_be_captured():
    process = subprocess.run(
        [sys.executable, "-c", FIRST_CAPTURE],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
