"""mode="max", RoIPool and RoIWarp on one map and on a pyramid: values, gradients, ties."""

import pytest
import torch
from torch.autograd import gradcheck

from mask_rcnn_plus.ops import backend, roi_align, roi_pool, roi_warp
from mask_rcnn_plus.ops.arguments import Grid
from mask_rcnn_plus.ops.roi_ops import pool_pyramid
from tests.ops import reference
from tests.ops.test_roi_align import BOXES, FORMATS, TOLERANCE, device, random_maps  # noqa: F401

POOLS = {
    "align": (
        lambda x, b, ratio: roi_align(x, b, (3, 4), 0.7, ratio, False, "max"),
        lambda x, b, ratio: reference.roi_align(x, b, (3, 4), 0.7, ratio, False, "max"),
    ),
    "align, aligned": (
        lambda x, b, ratio: roi_align(x, b, (3, 4), 0.7, ratio, True, "max"),
        lambda x, b, ratio: reference.roi_align(x, b, (3, 4), 0.7, ratio, True, "max"),
    ),
    "warp": (
        lambda x, b, ratio: roi_warp(x, b, (3, 4), 0.7, ratio, "max"),
        lambda x, b, ratio: reference.roi_warp(x, b, (3, 4), 0.7, ratio, "max"),
    ),
    "warp, average": (
        lambda x, b, ratio: roi_warp(x, b, (3, 4), 0.7, ratio),
        lambda x, b, ratio: reference.roi_warp(x, b, (3, 4), 0.7, ratio),
    ),
    "pool": (
        lambda x, b, ratio: roi_pool(x, b, (3, 4), 0.7),
        lambda x, b, ratio: reference.roi_pool(x, b, (3, 4), 0.7),
    ),
}


@pytest.mark.parametrize("ratio", [-1, 3])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("pool", list(POOLS))
def test_equals_the_definition(device, pool, dtype, memory_format, ratio):  # noqa: F811
    ours, definition = POOLS[pool]
    maps = random_maps(2, 37, 15, 21, dtype=dtype, device=device, memory_format=memory_format)
    exact, leaf = maps.double().cpu().requires_grad_(), maps.detach().requires_grad_()
    out, expected = ours(leaf, BOXES.to(device), ratio), definition(exact, BOXES, ratio)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    close = {"rtol": TOLERANCE[dtype] / 4, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double().cpu(), expected, **close)
    grad = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    for grad_format in FORMATS:
        (given,) = torch.autograd.grad(
            out, leaf, grad.to(device).contiguous(memory_format=grad_format), retain_graph=True
        )
        assert given.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(given.double().cpu(), expected_grad, **close)


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64, 131, 272])
def test_both_formats_agree_for_every_channel_count(device, channels):  # noqa: F811
    maps = random_maps(1, channels, 19, 37, device=device)
    boxes = BOXES[BOXES[:, 0] == 0].to(device)
    results = []
    for memory_format in FORMATS:
        leaf = maps.clone(memory_format=memory_format).requires_grad_()
        out = roi_align(leaf, boxes, 7, 1.0, 2, True, "max")
        out.backward(torch.arange(out.numel(), device=device).reshape(out.shape) / out.numel())
        results.append((out, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    exact = reference.roi_align(maps.double().cpu(), boxes.cpu(), (7, 7), 1.0, 2, True, "max")
    # Beyond cell 32, positions are exact to 4e-6; some of the samples are on slopes of six.
    torch.testing.assert_close(out.double().cpu(), exact, rtol=0, atol=2e-5)


def test_maximum_of_four_samples_by_hand():
    # Samples at 0.5 and 1.5 in both axes of a 3 x 3 map. The last, the mean of 16, 32, 128 and 256,
    # is the maximum.
    maps = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]]])
    maps.requires_grad_()
    out = roi_align(maps, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 1, 1.0, 2, mode="max")
    assert out.item() == (16 + 32 + 128 + 256) / 4
    out.backward()
    assert maps.grad.flatten().tolist() == [0, 0, 0, 0, 0.25, 0.25, 0, 0.25, 0.25]


def test_first_of_equal_maxima_gets_the_gradient():
    maps = torch.zeros(1, 1, 4, 4, requires_grad=True)
    roi_pool(maps, torch.tensor([[0.0, 1, 1, 2, 2]]), 1).backward()
    assert maps.grad.nonzero().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("channels", [1, 20])
def test_nan_is_the_maximum_and_infinity_does_not_spread(channels, memory_format):
    maps = torch.zeros(1, channels, 6, 6)
    maps[..., 1, 1], maps[..., 2, 2], maps[..., 4, 4] = torch.nan, 5, torch.inf
    maps = maps.contiguous(memory_format=memory_format).requires_grad_()
    out = roi_pool(maps, torch.tensor([[0.0, 0, 0, 5, 5]]), 2)
    expected = torch.tensor([[torch.nan, 0.0], [0.0, torch.inf]]).expand(1, channels, 2, 2)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0, atol=0)
    out.sum().backward()
    assert (maps.grad[..., 1, 1] == 1).all()
    assert maps.grad.sum() == 4 * channels
    # A sample at column 3 must not read column 4's infinity with weight zero.
    out = roi_align(maps.detach(), torch.tensor([[0.0, 3, 4, 4, 5]]), 1, 1.0, 1, True, "max")
    assert (out == 0).all()


def test_zeros_from_outside_count_but_get_no_gradient():
    maps = torch.full((1, 1, 4, 4), -1.0, requires_grad=True)
    across = torch.tensor([[0.0, -6, 0, 4, 4]])
    out = roi_align(maps, across, 1, 1.0, 2, mode="max")
    assert out.item() == 0
    out.backward()
    assert (maps.grad == 0).all()
    # RoIPool has no samples outside: it uses the existing cells.
    assert roi_pool(maps, across, 1).item() == -1


@pytest.mark.parametrize("grid", list(Grid))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pyramid_equals_each_level_separately(device, grid, memory_format):  # noqa: F811
    generator = torch.Generator().manual_seed(5)
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    corner = torch.rand(60, 2, generator=generator) * 300
    size = torch.exp(torch.rand(60, 2, generator=generator) * 4) * 13
    image = torch.randint(0, 2, (60, 1), generator=generator)
    boxes = torch.cat([image, corner, corner + size], dim=1).to(device)
    levels = [reference.fpn_level(box[1:], range(2, 6)) - 2 for box in boxes.tolist()]
    assert set(levels) == {0, 1, 2, 3}
    one_level = {
        Grid.ALIGN: lambda x, b, s: roi_align(x, b, 7, s, 2, False, "max"),
        Grid.ALIGN_HALF: lambda x, b, s: roi_align(x, b, 7, s, 2, True, "max"),
        Grid.WARP: lambda x, b, s: roi_warp(x, b, 7, s, 2, "max"),
        Grid.POOL: lambda x, b, s: roi_pool(x, b, 7, s),
    }[grid]
    ours, theirs = (
        [
            random_maps(
                2, 24, 96 >> i, 128 >> i, device=device, memory_format=memory_format
            ).requires_grad_()
            for i in range(4)
        ]
        for _ in range(2)
    )
    out = pool_pyramid(ours, boxes, 7, scales, 2, grid, "max", 224, 4)
    apart = [one_level(theirs[k], boxes[i : i + 1], scales[k]) for i, k in enumerate(levels)]
    expected = torch.cat(apart)
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape, generator=generator).to(device)
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(backend() != "native", reason="torchvision walks huge boxes by sample")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_edges(memory_format):
    maps = torch.ones(1, 3, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor(
        [
            [0.0, 1, 1, torch.nan, 5],
            [0, -1e4, -1e4, 1e4, 1e4],
            [0, -3e38, 0, 3e38, 5],
            [0, 50, 50, 60, 60],
            [0, 6, 6, 2, 2],
        ]
    )
    # Two samples per bin miss a map that is a thousandth of the bin; an adaptive grid hits it.
    for huge, pool in (
        (1, lambda b: roi_align(maps, b, 2, 1.0, -1, True, "max")),
        (0, lambda b: roi_align(maps, b, 2, 1.0, 2, False, "max")),
        (1, lambda b: roi_warp(maps, b, 2, 1.0, -1, "max")),
        (1, lambda b: roi_pool(maps, b, 2)),
    ):
        out = pool(boxes)
        assert out[0].isnan().all()
        assert out[2].isnan().all()
        assert (out[1] == huge).all()
        assert (out[3] == 0).all()
        assert out[4].isfinite().all()
        maps.grad = None
        out[[1, 3]].sum().backward()
        assert maps.grad.sum().item() == pytest.approx(12 * huge)
        assert pool(boxes[:0]).shape == (0, 3, 2, 2)
        with pytest.raises(RuntimeError, match=r"boxes\[0\] names image 1"):
            pool(torch.tensor([[1.0, 1, 1, 5, 5]]))
    assert (roi_align(torch.ones(1, 3, 0, 8), boxes[1:2], 2, mode="max") == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", list(POOLS))
def test_gradcheck(pool, channels_last):
    maps = random_maps(2, 2, 6, 7, dtype=torch.float64)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    ours, _ = POOLS[pool]
    gradcheck(
        lambda x: ours(x, BOXES / 2 * torch.tensor([2.0, 1, 1, 1, 1]), 2), maps.requires_grad_()
    )


@pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, channels_last):
    maps = [random_maps(2, 3, 30 >> i, 40 >> i, dtype=dtype) for i in range(2)]
    if channels_last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    maps = [m.requires_grad_() for m in maps]
    settings = ([0.25, 0.125], 2, int(Grid.WARP), 2, 224.0, 4, channels_last)
    operators = torch.ops.mask_rcnn_plus
    torch.library.opcheck(operators.fpn_roi_max, (maps, BOXES, 3, 2, *settings))
    out, index = operators.fpn_roi_max(maps, BOXES, 3, 2, *settings)
    sizes = [size for m in maps for size in m.shape]
    grad = torch.randn_like(out).detach()
    torch.library.opcheck(operators.fpn_roi_max_backward, (grad, index, BOXES, sizes, *settings))


@pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")
@pytest.mark.parametrize("memory_format", FORMATS)
def test_index_outside_the_bin_is_ignored(memory_format):
    settings = ([1.0], 0, int(Grid.POOL), 0, 1.0, 0, memory_format == torch.channels_last)
    boxes = torch.tensor([[0.0, 1, 1, 2, 2], [0, 90, 90, 99, 99]])
    index = torch.tensor([-(2**31), -1, 0, 1, 4, 2**31 - 1]).int().repeat(2, 1)[:, :, None, None]
    grad = torch.ones(2, 6, 1, 1)
    backward = torch.ops.mask_rcnn_plus.fpn_roi_max_backward
    (out,) = backward(grad, index, boxes, [1, 6, 5, 5], *settings)
    assert out.nonzero().tolist() == [[0, 2, 1, 1], [0, 3, 1, 2]]


def test_second_derivative_is_refused():
    maps = torch.randn(1, 2, 8, 8, requires_grad=True)
    out = roi_pool(maps, torch.tensor([[0.0, 1, 1, 5, 5]]), 2)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), maps, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be 'avg' or 'max', got 'mean'"):
        roi_align(torch.ones(1, 1, 4, 4), torch.zeros(0, 5), 2, mode="mean")
