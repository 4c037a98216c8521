"""Unusual boxes and maps: empty, invalid, far outside, huge."""

import math

import pytest
import torch

from mask_rcnn_plus.ops import backend, fpn_roi_align, roi_align
from mask_rcnn_plus.ops.arguments import Grid

FORMATS = [torch.contiguous_format, torch.channels_last]
# The fallback, torchvision's operators, computes every sample of a huge box.
native_only = pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("maps", "rois"), [((2, 3, 8, 8), 0), ((2, 0, 8, 8), 3), ((0, 3, 8, 8), 0), ((1, 3, 0, 8), 2)]
)
def test_empty_inputs(maps, rois, memory_format):
    features = torch.ones(maps).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor([[0.0, 1, 1, 5, 5]]).expand(rois, 5)
    out = roi_align(features, boxes, (2, 3))
    assert out.shape == (rois, maps[1], 2, 3)
    assert (out == 0).all()
    out.sum().backward()
    assert features.grad.shape == maps
    assert (features.grad == 0).all()


def test_map_without_cells_does_not_affect_other_levels():
    # By FPN's equation 1, boxes smaller than 56 pixels belong to the first level.
    full, empty = torch.ones(1, 1, 8, 8), torch.ones(1, 1, 0, 4)
    small, large = [0.0, 1, 1, 5, 5], [0.0, 0, 0, 400, 400]
    for first, second, expected in ((full, empty, 1.0), (empty, full, 0.0)):
        maps = [m.clone().requires_grad_() for m in (first, second)]
        out = fpn_roi_align(maps, torch.tensor([small]), 1, [0.25, 0.125], 2, True)
        assert out.item() == expected
        out.sum().backward()
        assert [m.grad.shape for m in maps] == [first.shape, second.shape]
        assert sum(m.grad.sum() for m in maps) == pytest.approx(expected)
    out = fpn_roi_align([full, empty], torch.tensor([small, large]), 1, [0.25, 0.125], 2, True)
    assert out.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("shape", [(1, 1, 0, 4), (1, 1, 4, 0), (1, 1, 0, 0)])
def test_map_without_cells_still_gives_nan_for_invalid_boxes(shape, mode):
    boxes = torch.tensor([[0, math.nan, 1, 5, 5], [0, 1, 1, 5, 5]])
    invalid, valid = roi_align(torch.ones(shape), boxes, 1, mode=mode).flatten().tolist()
    assert math.isnan(invalid) and valid == 0


def test_empty_list_of_boxes():
    assert roi_align(torch.ones(0, 3, 4, 4), [], 2).shape == (0, 3, 2, 2)


@pytest.mark.parametrize("image", [2, -1, 0.5, math.nan, math.inf, 1e30])
def test_wrong_image_index_is_an_error(image):
    boxes = torch.tensor([[0, 1.0, 1, 5, 5], [image, 1, 1, 5, 5]])
    with pytest.raises(RuntimeError, match=r"boxes\[1\] names image .* hold images 0 to 1"):
        roi_align(torch.ones(2, 3, 8, 8), boxes, 2)


@pytest.mark.parametrize("memory_format", FORMATS)
# Without these checks, the minimum length of unaligned boxes would hide a NaN, and the adaptive
# grid of aligned boxes would be empty.
@pytest.mark.parametrize(("ratio", "aligned"), [(-1, True), (2, True), (-1, False)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [1, 2, 3, 4])
def test_non_finite_coordinate_gives_nan_only_in_its_row(
    column, bad, ratio, aligned, memory_format
):
    features = torch.ones(1, 3, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor([[0, 1.0, 1, 5, 5], [0, 1, 1, 5, 5]])
    boxes[0, column] = bad
    out = roi_align(features, boxes, 2, 1.0, ratio, aligned)
    assert out[0].isnan().all()
    assert (out[1] == 1).all()
    out[1].sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.sum() == pytest.approx(12)


@native_only
def test_box_beyond_fp32_gives_nan():
    boxes = torch.tensor([[0, -3e38, -3e38, 3e38, 3e38]])
    assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).isnan().all()


@native_only
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("ratio", [-1, 2])
def test_huge_boxes_are_fast_and_finite(ratio, memory_format):
    # Sides of a million cells and more: 2^15 samples per bin and axis, nearly all outside the map.
    features = torch.ones(1, 3, 8, 8).contiguous(memory_format=memory_format).requires_grad_()
    boxes = torch.tensor([[0, -1e6, -1e6, 1e6, 1e6], [0, -1e30, -1e30, 1e30, 1e30]]).repeat(50, 1)
    out = roi_align(features, boxes, 7, 1.0, ratio, True)
    assert out.isfinite().all()
    assert out.min() >= 0
    assert out.max() <= 1
    out.sum().backward()
    assert features.grad.isfinite().all()


@native_only
def test_huge_box_averages_over_its_whole_area():
    # 8 of 8000 rows and columns are on the map. Samples up to one cell outside are clamped to it,
    # which makes about 9 with half a sample less at each end: the mean is about (9 / 8000)^2.
    out = roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, -4000, -4000, 4000, 4000]]), 1)
    assert out.item() == pytest.approx((9.0 / 8000) ** 2, rel=0.01)


def test_boxes_outside_give_zeros_and_no_gradient():
    features = torch.ones(1, 3, 8, 8, requires_grad=True)
    boxes = torch.tensor([[0, 50.0, 50, 60, 60], [0, -60, -60, -50, -50], [0, 1, 90, 5, 99]])
    out = roi_align(features, boxes, 3, 1.0, 2)
    assert (out == 0).all()
    out.sum().backward()
    assert (features.grad == 0).all()


def test_inverted_boxes():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8).contiguous()
    inverted, upright = torch.tensor([[0.0, 6, 6, 2, 2]]), torch.tensor([[0.0, 2, 2, 6, 6]])
    # On a fixed grid the bins are reversed; an adaptive grid has no samples; an unaligned box has
    # one cell from its start, here columns 6 to 7.
    backwards = roi_align(ramp, inverted, 2, 1.0, 2, True)
    assert torch.equal(backwards, roi_align(ramp, upright, 2, 1.0, 2, True).flip(2, 3))
    assert (roi_align(ramp, inverted, 2, 1.0, -1, True) == 0).all()
    assert roi_align(ramp, inverted, 1, 1.0, 2, False).item() == 6.5


@native_only
def test_more_than_two_to_the_31_elements():
    # Untouched memory is not allocated; only the last corner, beyond 2^31, is written and read.
    try:
        features = torch.empty(
            1, 2, 36000, 36000, dtype=torch.bfloat16, memory_format=torch.channels_last
        )
    except RuntimeError:
        pytest.skip("cannot reserve 5 GB of address space")
    features[:, :, -4:, -4:] = torch.tensor([3.0, 5.0])[:, None, None]
    box = torch.tensor([[0.0, 35997, 35997, 35999, 35999]])
    out = roi_align(features, box, 2, 1.0, 2, True)
    assert (out == torch.tensor([3.0, 5.0])[:, None, None]).all()


@native_only
@pytest.mark.parametrize("channels", [64, 256, 272, 260])
def test_output_larger_than_the_caches_is_bitwise_equal(channels):
    # Outputs of 16 MiB or more are written with non-temporal stores, if their cells are aligned.
    side = 7 if channels == 256 else 8
    rois = (17 << 20) // (4 * channels * side**2) + 1
    features = torch.rand(1, channels, 20, 20).contiguous(memory_format=torch.channels_last)
    corners = 16 * torch.rand(rois, 2)
    boxes = torch.cat([torch.zeros(rois, 1), corners, corners + 4 * torch.rand(rois, 2)], 1)
    boxes[3, 1] = math.nan
    whole = roi_align(features, boxes, side, 1.0, 2, True)
    parts = [roi_align(features, chunk, side, 1.0, 2, True) for chunk in boxes.chunk(2)]
    assert whole.nbytes >= 16 << 20 > parts[0].nbytes
    assert torch.equal(whole.view(torch.int32), torch.cat(parts).view(torch.int32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.ones(3, 8, 8)}, r"\(N, C, H, W\); level 0 has \(3, 8, 8\)"),
        ({"input": torch.ones(1, 3, 8, 8).int()}, "dtype torch.int32"),
        ({"boxes": torch.ones(2, 4)}, r"shape \(R, 5\).*got \(2, 4\)"),
        ({"boxes": [torch.ones(2, 5)]}, r"boxes\[0\].*got \(2, 5\)"),
        ({"output_size": 0}, "output_size must be .* got 0"),
        ({"output_size": (2, 2, 2)}, "output_size"),
    ],
)
def test_refusals_name_the_argument(arguments, message):
    good = {"input": torch.ones(1, 3, 8, 8), "boxes": torch.ones(0, 5), "output_size": 2}
    with pytest.raises(ValueError, match=message):
        roi_align(**(good | arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spatial_scales": [0.25]}, "2 feature maps need a list of 2 spatial_scales, got"),
        ({"spatial_scales": [0.25, 0.25]}, "each half of the previous one"),
        ({"spatial_scales": [0.3, 0.15]}, "1 / 2\\^k"),
        ({"features": []}, "features is empty"),
        (
            {"features": [torch.ones(1, 3, 8, 8), torch.ones(1, 4, 4, 4)]},
            "level 1 has 1 images of 4 channels",
        ),
        ({"features": [torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4).half()]}, "level 1 is"),
        ({"canonical_box_size": 0}, "canonical_box_size must be above zero"),
    ],
)
def test_pyramid_refusals_name_the_argument(changes, message):
    good = {
        "features": [torch.ones(1, 3, 8, 8), torch.ones(1, 3, 4, 4)],
        "boxes": torch.ones(0, 5),
        "output_size": 2,
        "spatial_scales": [0.25, 0.125],
        "sampling_ratio": 2,
        "aligned": True,
    }
    with pytest.raises(ValueError, match=message):
        fpn_roi_align(**(good | changes))


@native_only
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_size": 7.0}, "output_size must be .* whole numbers .* got 7.0"),
        ({"output_size": "7"}, "output_size must be .* got '7'"),
        ({"output_size": None}, "output_size must be .* got None"),
        ({"output_size": True}, "output_size must be .* got True"),
        ({"output_size": (2, 2, 2)}, "output_size must be"),
        ({"output_size": 70000}, "output_size must be .* 32768, got 70000"),
        ({"sampling_ratio": 2.5}, "sampling_ratio must be a whole number .* got 2.5"),
        ({"sampling_ratio": "2"}, "sampling_ratio must be"),
        ({"sampling_ratio": 40000}, "sampling_ratio must be .* 32768, got 40000"),
        ({"spatial_scale": 0.0}, "spatial_scale must be above zero and finite, got 0.0"),
        ({"spatial_scale": -0.25}, "spatial_scale must be"),
        ({"spatial_scale": math.nan}, "spatial_scale must be"),
        ({"spatial_scale": math.inf}, "spatial_scale must be"),
        ({"input": [torch.ones(1, 3, 8, 8)]}, "a feature map must be a tensor; level 0 is list"),
        ({"boxes": [[0.0, 1, 1, 5, 5]]}, "boxes must be a tensor .* got list"),
        ({"boxes": torch.ones(1, 5).numpy()}, "boxes must be a tensor .* got ndarray"),
        ({"boxes": torch.ones(1, 5) * 1j}, "real numbers, .* got torch.complex64"),
    ],
)
def test_wrong_types_are_refused_by_name(changes, message):
    arguments = {
        "input": torch.ones(1, 3, 8, 8),
        "boxes": torch.tensor([[0.0, 1, 1, 5, 5]]),
        "output_size": 2,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        roi_align(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(1, 3, 8, 8)}, "features is one tensor; give a list"),
        ({"spatial_scales": 0.25}, "a list of 1 spatial_scales, got 0.25"),
        ({"canonical_box_size": None}, "canonical_box_size must be .* got None"),
        ({"canonical_level": 4.5}, "canonical_level must be a whole number, got 4.5"),
        ({"features": [torch.ones(1, 3, 8, 8)] * 33, "spatial_scales": [0.5] * 33}, "at most 32"),
    ],
)
def test_invalid_pyramid_is_refused_by_name(changes, message):
    arguments = {
        "features": [torch.ones(1, 3, 8, 8)],
        "boxes": torch.tensor([[0.0, 1, 1, 5, 5]]),
        "output_size": 2,
        "spatial_scales": [0.25],
        "sampling_ratio": 2,
        "aligned": True,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        fpn_roi_align(**arguments)


def test_numpy_integers_are_accepted():
    numpy = pytest.importorskip("numpy")
    features, boxes = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 1, 1, 5, 5]])
    out = roi_align(features, boxes, (numpy.int64(3), numpy.int32(2)), 1.0, numpy.int64(2))
    assert torch.equal(out, roi_align(features, boxes, (3, 2), 1.0, 2))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_meta_tensors_have_shapes(mode):
    features, boxes = torch.ones(2, 3, 8, 8, device="meta"), torch.ones(4, 5, device="meta")
    out = roi_align(features, boxes, (2, 3), mode=mode)
    assert out.shape == (4, 3, 2, 3) and out.device.type == "meta"


def test_roi_pool_has_no_average():
    settings = ([1.0], 0, int(Grid.POOL), 0, 1.0, 0, False)
    boxes, maps = torch.tensor([[0.0, 1, 1, 2, 2]]), torch.ones(1, 1, 4, 4)
    operators = torch.ops.mask_rcnn_plus
    with pytest.raises(RuntimeError, match="RoIPool has no average"):
        operators.fpn_roi_align([maps], boxes, 2, 2, *settings)
    with pytest.raises(RuntimeError, match="RoIPool has no average"):
        operators.fpn_roi_align_backward(torch.ones(1, 1, 2, 2), boxes, [1, 1, 4, 4], *settings)
