"""roi_pool and roi_warp: RoI borders rounded to whole cells."""

import pytest
import torch
from torch.autograd import gradcheck
from torchvision.ops import roi_pool as torchvision_roi_pool

from mask_rcnn_plus.ops import RoIPool, RoIWarp, roi_align, roi_pool, roi_warp


@pytest.mark.parametrize(("height", "width", "bin_h", "bin_w"), [(21, 14, 3, 2), (35, 42, 5, 6)])
def test_divisible_region_is_plain_max_pooling(height, width, bin_h, bin_w):
    # Examples: 21 x 14 cells into 7 x 7 is 3 x 2 max pooling, 35 x 42 is 5 x 6.
    maps = torch.randn(1, 2, height, width, generator=torch.Generator().manual_seed(1))
    box = torch.tensor([[0.0, 0, 0, width - 1, height - 1]])
    expected = torch.nn.functional.max_pool2d(maps, (bin_h, bin_w))
    assert torch.equal(roi_pool(maps, box, 7), expected)


def test_bins_of_an_indivisible_region_share_rows():
    # 15 rows into 7: bin p covers rows floor(15 p / 7) to ceil(15 (p + 1) / 7), so neighbours
    # share a row. Rows increase, so the maximum is each bin's last row.
    maps = torch.arange(15.0)[:, None].expand(1, 1, 15, 21).contiguous()
    out = roi_pool(maps, torch.tensor([[0.0, 0, 0, 20, 14]]), 7)
    assert out[0, 0, :, 0].tolist() == [2, 4, 6, 8, 10, 12, 14]


def test_fifteen_pixels_are_rounded_to_two_cells():
    # 128 px on 25 cells: 15 px are 2.93 cells; a RoI from 0.49 to 1.49 cells (2.5 to 7.6 px)
    # rounds to cells 0 and 1, so the ramp's maximum is 1.
    ramp = torch.arange(25.0).expand(1, 1, 25, 25).contiguous()
    assert roi_pool(ramp, torch.tensor([[0.0, 2.5, 2.5, 7.6, 7.6]]), 1, 25 / 128).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_pool_equals_torchvision(dtype):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 5, 20, 30, generator=generator).to(dtype).requires_grad_()
    boxes = torch.rand(30, 5, generator=generator) * 40 - 5
    boxes[:, 0] = torch.arange(30) % 2
    theirs = maps.detach().double().requires_grad_()
    out = roi_pool(maps, boxes, (3, 4), 0.8)
    expected = torchvision_roi_pool(theirs, boxes.double(), (3, 4), 0.8)
    assert out.dtype == dtype
    assert torch.equal(out.double(), expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(maps.grad.double(), theirs.grad.to(dtype).double())


def test_warp_with_as_many_cells_as_bins_copies_them():
    maps = torch.randn(1, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    # 1.6 to 5.5 rounds to cells 2 to 6 (halves away from zero), 0.4 to 3.6 to cells 0 to 4.
    out = roi_warp(maps, torch.tensor([[0, 1.6, 0.4, 5.5, 3.6]]), 5, 1.0, 1)
    assert torch.equal(out[0], maps[0, :, 0:5, 2:7])


def test_warp_rounds_negative_halves_away_from_zero():
    maps = torch.arange(8.0).expand(1, 1, 8, 8).contiguous()
    # -0.5 rounds to cell -1, so cells -1 to 1: the middle of three bins is cell 0.
    out = roi_warp(maps, torch.tensor([[0, -0.5, 0, 1, 2]]), 3, 1.0, 1)
    assert out[0, 0, 0].tolist() == [0, 0, 1]


def test_warp_samples_like_align_inside():
    maps = torch.randn(2, 3, 12, 14, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[0, 6.0, 8, 21, 17], [1, 9, 2, 4, 20]])
    # Halved: cells 3 to 11 (10.5 away from zero) by 4 to 9 (8.5); inverted in x: only cell 5.
    cells = torch.tensor([[0.0, 3, 4, 12, 10], [1, 5, 1, 6, 11]])
    out = roi_warp(maps, boxes, 4, 0.5, 2)
    assert torch.equal(out, roi_align(maps, cells, 4, 1.0, 2, aligned=True))


@pytest.mark.parametrize("pool", [RoIPool(2, 0.5), RoIWarp(2, 0.5, 2)])
def test_gradcheck_and_edges(pool):
    maps = torch.randn(2, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0.0, 1, 2, 9, 12], [1, -4, 3, 30, 8]])
    gradcheck(lambda x: pool(x, boxes), maps)
    assert pool(maps, boxes[:0]).shape == (0, 2, 2, 2)
    boxes[0, 3] = torch.nan
    out = pool(maps, boxes)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    boxes[0, 0] = 2
    with pytest.raises(RuntimeError, match=r"boxes\[0\] names image 2"):
        pool(maps, boxes)
