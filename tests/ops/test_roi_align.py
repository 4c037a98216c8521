"""roi_align and fpn_roi_align against definitions, results by hand and torchvision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align as torchvision_roi_align

from mask_rcnn_plus.ops import fpn_roi_align, roi_align
from tests.ops import reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = [torch.contiguous_format, torch.channels_last]
# The precision of each dtype for values up to four. Boxes are fp32 for every dtype: near cell 20,
# positions are exact to 2e-6, on slopes up to six.
TOLERANCE = {
    torch.float32: 6e-6,
    torch.float64: 6e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# Tolerance for torchvision's results, relative to the largest value. Its CUDA kernels fuse products
# and sums, which moves a sample by a unit in the last place: 8e-6 of a cell beyond column 64, on
# slopes up to six.
THEIRS = {"cpu": 1e-6, "cuda": 2e-5}
# Inside, across each border, outside, inverted in one and in both axes, empty, and one cell wide.
BOXES = torch.tensor(
    [
        [0, 2.3, 1.7, 17.2, 13.9],
        [1, -6.0, -3.5, 9.1, 7.7],
        [0, 11.0, 6.0, 33.0, 29.0],
        [1, 60.0, 60.0, 80.0, 90.0],
        [0, 12.0, 3.0, 4.0, 9.0],
        [1, 12.0, 9.0, 4.0, 3.0],
        [0, 5.0, 5.0, 5.0, 5.0],
        [1, 0.0, 0.0, 1.0, 1.0],
    ]
)


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def random_maps(*shape, dtype=torch.float32, device="cpu", memory_format=torch.contiguous_format):
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    return maps.to(device, dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 1, 3])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_equals_the_definition(device, dtype, memory_format, ratio, aligned):
    maps = random_maps(2, 5, 15, 21, dtype=dtype, device=device, memory_format=memory_format)
    out = roi_align(maps, BOXES.to(device), (3, 4), 0.7, ratio, aligned)
    expected = reference.roi_align(maps.double().cpu(), BOXES, (3, 4), 0.7, ratio, aligned)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out.double().cpu(), expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_gradient_equals_the_definition(device, dtype, memory_format):
    maps = random_maps(2, 5, 15, 21, dtype=dtype, device=device, memory_format=memory_format)
    exact = maps.double().cpu().requires_grad_()
    expected = reference.roi_align(exact, BOXES, (3, 4), 0.7, 2, True)
    grad = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    for grad_format in FORMATS:
        given_grad = grad.to(device).contiguous(memory_format=grad_format)
        leaf = maps.detach().requires_grad_()
        roi_align(leaf, BOXES.to(device), (3, 4), 0.7, 2, True).backward(given_grad)
        assert leaf.grad.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(
            leaf.grad.double().cpu(),
            expected_grad,
            rtol=TOLERANCE[dtype] / 4,
            atol=TOLERANCE[dtype],
        )


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 64, 131, 272])
def test_both_formats_agree_for_every_channel_count(device, channels):
    maps = random_maps(1, channels, 19, 37, device=device)
    boxes = BOXES[BOXES[:, 0] == 0].to(device)
    results = []
    for memory_format in FORMATS:
        leaf = maps.clone(memory_format=memory_format).requires_grad_()
        out = roi_align(leaf, boxes, 7, 1.0, 2, True)
        out.backward(torch.arange(out.numel(), device=device).reshape(out.shape) / out.numel())
        results.append((out, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(
        results[0][0],
        torchvision_roi_align(maps, boxes, 7, 1.0, 2, True),
        rtol=0,
        atol=THEIRS[device],
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("ratio", [2, 0])
def test_equals_torchvision(device, ratio, memory_format):
    generator = torch.Generator().manual_seed(3)
    maps = random_maps(2, 40, 50, 76, device=device, memory_format=memory_format)
    corner = torch.rand(200, 2, generator=generator) * torch.tensor([300.0, 200.0]) - 20
    size = torch.exp(torch.rand(200, 2, generator=generator) * 5)
    image = torch.randint(0, 2, (200, 1), generator=generator)
    boxes = torch.cat([image, corner, corner + size], dim=1).to(device)
    ours, theirs = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    out = roi_align(ours, boxes, 7, 0.25, ratio, True)
    expected = torchvision_roi_align(theirs, boxes, 7, 0.25, ratio, True)
    assert (out - expected).abs().max() <= THEIRS[device] * expected.abs().max()
    grad = torch.randn(out.shape, generator=generator).to(device)
    out.backward(grad)
    expected.backward(grad)
    tolerance = 10 * THEIRS[device]
    assert (ours.grad - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


def test_ramp_gives_the_centres_of_bins():
    # Mask R-CNN's example of quantisation: 15 px of a 128 px image on a 25 x 25 map are 2.93
    # cells. On a map whose values are its columns, each bin's average is the column of its centre:
    # thirds of 2.9296875 cells from 0 have the centres 0.48828125, 1.46484375 and 2.44140625.
    ramp = torch.arange(25.0).expand(1, 1, 25, 25).contiguous()
    box = torch.tensor([[0.0, 0.0, 0.0, 15.0, 15.0]])
    out = roi_align(ramp, box, 3, 25 / 128, 2, aligned=False)
    assert torch.equal(out[0, 0, 0], torch.tensor([0.48828125, 1.46484375, 2.44140625]))
    # Aligned, every centre is half a cell less. The first bin has samples at -0.256, clamped to 0,
    # and 0.232: (0 + 0.232421875) / 2.
    out = roi_align(ramp, box, 3, 25 / 128, 2, aligned=True)
    assert torch.equal(out[0, 0, 0], torch.tensor([0.1162109375, 0.96484375, 1.94140625]))


def test_four_samples_by_hand():
    # One bin over cells (0, 0) to (2, 2) of a 3 x 3 map, samples at 0.5 and 1.5 in both axes: each
    # is the mean of the four cells around it.
    maps = torch.tensor([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]]])
    out = roi_align(maps, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 1, 1.0, 2)
    means = [(1 + 2 + 8 + 16) / 4, (2 + 4 + 16 + 32) / 4, (8 + 16 + 64 + 128) / 4, 432 / 4]
    assert out.item() == sum(means) / 4


def test_list_of_boxes_has_one_entry_per_image():
    maps = random_maps(3, 4, 12, 12)
    first, last = torch.tensor([[1.0, 1, 6, 6], [2, 3, 9, 8]]), torch.tensor([[0.0, 2, 5, 11]])
    out = roi_align(maps, [first, torch.zeros(0, 4), last], 2)
    rows = torch.tensor([[0.0, 1, 1, 6, 6], [0, 2, 3, 9, 8], [2, 0, 2, 5, 11]])
    assert torch.equal(out, roi_align(maps, rows, 2))


# (side of a square box, level): P4 begins at 224 pixels, and each level at twice the previous one.
BORDERS = [(1, 2), (111, 2), (112, 3), (223, 3), (224, 4), (447, 4), (448, 5), (5000, 5)]


@pytest.mark.parametrize(("side", "level"), BORDERS)
def test_levels_by_hand(device, side, level):
    # Every map is constant: its level's number.
    maps = [torch.full((1, 1, 64 >> i, 64 >> i), i + 2.0, device=device) for i in range(4)]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    box = torch.tensor([[0.0, 4.0, 4.0, 4.0 + side, 4.0 + side]], device=device)
    assert reference.fpn_level(box[0, 1:].tolist(), range(2, 6)) == level
    assert fpn_roi_align(maps, box, 1, scales, 1, True)[0, 0, 0, 0] in (level, 0)
    inside = torch.tensor([[0.0, 0.0, 0.0, side, side]], device=device)
    small = fpn_roi_align(maps, inside, (64, 64), scales, 1, True)[0, 0, 0, 0]
    assert small == level


@pytest.mark.parametrize("memory_format", FORMATS)
def test_pyramid_equals_each_level_separately(device, memory_format):
    generator = torch.Generator().manual_seed(5)
    maps = [
        random_maps(2, 24, 96 >> i, 128 >> i, device=device, memory_format=memory_format)
        for i in range(4)
    ]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    corner = torch.rand(80, 2, generator=generator) * 300
    size = torch.exp(torch.rand(80, 2, generator=generator) * 4) * 13
    image = torch.randint(0, 2, (80, 1), generator=generator)
    boxes = torch.cat([image, corner, corner + size], dim=1)
    levels = [reference.fpn_level(box[1:], range(2, 6)) - 2 for box in boxes.tolist()]
    assert set(levels) == {0, 1, 2, 3}
    ours = [m.clone().requires_grad_() for m in maps]
    theirs = [m.clone().requires_grad_() for m in maps]
    out = fpn_roi_align(ours, boxes.to(device), 7, scales, 2, True)
    expected = torch.stack(
        [
            torchvision_roi_align(theirs[k], boxes[i : i + 1].to(device), 7, scales[k], 2, True)[0]
            for i, k in enumerate(levels)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=2 * THEIRS[device])
    grad = torch.randn(out.shape, generator=generator).to(device)
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad - b.grad).abs().max() <= 10 * THEIRS[device] * b.grad.abs().max()


coordinates = st.floats(-40, 80, width=32)
boxes_strategy = st.lists(st.tuples(*[coordinates] * 4), min_size=1, max_size=4).map(
    lambda rows: torch.tensor([[0.0, *row] for row in rows])
)
ratios = st.sampled_from([-1, 1, 2, 5])


@settings(max_examples=60, deadline=None)
@given(boxes_strategy, ratios, st.booleans(), st.floats(-4, 4, width=32))
def test_constant_map_gives_the_constant(boxes, ratio, aligned, constant):
    # The boxes are folded into the map, and are not inverted.
    corners = boxes[:, 1:].abs() % 20
    low, high = (
        torch.minimum(corners[:, :2], corners[:, 2:]),
        torch.maximum(corners[:, :2], corners[:, 2:]),
    )
    boxes = torch.cat([boxes[:, :1], low, high + 1.5], dim=1)
    maps = torch.full((1, 3, 24, 24), constant)
    out = roi_align(maps, boxes, 3, 1.0, ratio, aligned)
    torch.testing.assert_close(out, torch.full_like(out, constant), rtol=1e-6, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(boxes_strategy, ratios, st.booleans(), st.floats(-3, 3), st.floats(-3, 3))
def test_linear_in_the_map(boxes, ratio, aligned, a, b):
    one, two = random_maps(1, 3, 20, 22), random_maps(1, 3, 22, 20).transpose(2, 3).contiguous()
    mixed = roi_align(a * one + b * two, boxes, (2, 3), 0.5, ratio, aligned)
    apart = a * roi_align(one, boxes, (2, 3), 0.5, ratio, aligned)
    apart = apart + b * roi_align(two, boxes, (2, 3), 0.5, ratio, aligned)
    torch.testing.assert_close(mixed, apart, rtol=0, atol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 63), st.integers(1, 63), ratios)
def test_translation_by_whole_cells(dx, dy, eighths, size, ratio):
    # Eighths of a cell are exact in fp32, so the shifted box reads the same values.
    maps = random_maps(1, 2, 40, 40)
    box = torch.tensor([[0, 2 + eighths / 8, 3.0, 2 + (eighths + size) / 8, 3 + size / 8]])
    shifted = torch.roll(maps, (dy, dx), (2, 3))
    moved = box + torch.tensor([0.0, dx, dy, dx, dy])
    out = roi_align(maps, box, 2, 1.0, ratio, True)
    torch.testing.assert_close(roi_align(shifted, moved, 2, 1.0, ratio, True), out)


@settings(max_examples=60, deadline=None)
@given(boxes_strategy, ratios, st.booleans())
def test_gradient_is_the_transpose(boxes, ratio, aligned):
    # <pool(x), g> = <x, pool^T(g)> for every box, inside or not.
    maps = random_maps(1, 2, 20, 22, dtype=torch.float64).requires_grad_()
    out = roi_align(maps, boxes, (2, 3), 0.5, ratio, aligned)
    grad = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    (back,) = torch.autograd.grad(out, maps, grad)
    assert math.isclose((out * grad).sum().item(), (maps * back).sum().item(), abs_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 80), st.integers(0, 80), st.integers(4, 70), ratios)
def test_gradient_of_an_inner_box_preserves_the_sum(x, y, size, ratio):
    maps = torch.zeros(1, 1, 24, 24, requires_grad=True)
    box = torch.tensor([[0.0, 1 + x / 8, 1 + y / 8, 1 + (x + size) / 8, 1 + (y + size) / 8]])
    roi_align(maps, box, 3, 1.0, ratio, True).sum().backward()
    assert maps.grad.sum().item() == pytest.approx(9, rel=1e-5)
