"""FusedROIPooler, compared with the detectron2 pooler that it replaces."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from mask_rcnn_plus.modeling import FusedROIPooler
from mask_rcnn_plus.modeling.pooler import POOLER_TYPES

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def maps(channels=6, images=2, requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    shapes = [(images, channels, 64 >> i, 96 >> i) for i in range(4)]
    return [torch.randn(s, generator=generator).requires_grad_(requires_grad) for s in shapes]


def boxes(counts=(40, 25)):
    generator = torch.Generator().manual_seed(2)
    lists = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * 200
        # From 8 to 800 pixels, so that every level gets boxes.
        size = 8 * 100 ** torch.rand(count, 2, generator=generator)
        lists.append(Boxes(torch.cat([corner, corner + size], dim=1)))
    return lists


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("levels", [4, 1])
def test_equals_detectron2(levels, pooler_type, ratio):
    ours, theirs = maps(requires_grad=True)[:levels], maps(requires_grad=True)[:levels]
    arguments = (7, SCALES[:levels], ratio, pooler_type)
    out = FusedROIPooler(*arguments)(ours, boxes())
    expected = ROIPooler(*arguments)(theirs, boxes())
    torch.testing.assert_close(out, expected, rtol=0, atol=3e-6)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(grad)
    expected.backward(grad)
    for a, b in zip(ours, theirs, strict=True):
        assert b.grad.abs().max() > 0
        assert (a.grad - b.grad).abs().max() <= 1e-5 * b.grad.abs().max()


def test_fp64_maps_equal_detectron2_in_fp64():
    features = [m.double() for m in maps()]
    exact = [Boxes(b.tensor) for b in boxes()]
    for b in exact:  # Boxes converts what it is given to fp32
        b.tensor = b.tensor.double() + 1 / 3
    arguments = (7, SCALES, 2, "ROIAlignV2")
    out, expected = (kind(*arguments)(features, exact) for kind in (FusedROIPooler, ROIPooler))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("pooler_type", sorted(POOLER_TYPES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_can_be_scripted(pooler_type, dtype):
    pooler = FusedROIPooler((3, 5), SCALES, 2, pooler_type)
    scripted = torch.jit.script(pooler)
    features = [m.to(dtype) for m in maps()]
    assert torch.equal(scripted(features, boxes()), pooler(features, boxes()))
    last = [m.contiguous(memory_format=torch.channels_last) for m in features]
    out = scripted(last, boxes((0, 3)))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, pooler(last, boxes((0, 3))))


def test_a_sampling_ratio_of_zero_as_a_float():
    pooler = FusedROIPooler(7, SCALES, 0.0, "ROIAlignV2")
    assert torch.equal(
        pooler(maps(), boxes()), FusedROIPooler(7, SCALES, 0, "ROIAlignV2")(maps(), boxes())
    )
    with pytest.raises(ValueError, match=r"sampling_ratio must be .*, got 0\.5"):
        FusedROIPooler(7, SCALES, 0.5, "ROIAlignV2")


def test_canonical_size_and_level_move_boxes_as_in_detectron2():
    arguments = (7, SCALES, 2, "ROIAlignV2", 56, 3)
    out = FusedROIPooler(*arguments)(maps(), boxes())
    torch.testing.assert_close(out, ROIPooler(*arguments)(maps(), boxes()), rtol=0, atol=3e-6)
    default = FusedROIPooler(*arguments[:4])(maps(), boxes())
    assert not torch.allclose(out, default)


def test_warp_rounds_to_whole_cells():
    # (9, 9) to (22, 22) at stride 4 are 2.25 to 5.5 cells: cells 2 to 6, whose middle is cell 4.
    features = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    pooler = FusedROIPooler(1, [1 / 4], 1, "ROIWarp")
    assert pooler([features], [Boxes(torch.tensor([[9.0, 9, 22, 22]]))]).item() == 4


def test_max_types_return_the_maximum_sample():
    features = torch.arange(16.0).expand(1, 1, 16, 16).contiguous()
    box = [Boxes(torch.tensor([[8.0, 8, 24, 24]]))]

    def pooled(pooler_type):
        return FusedROIPooler(1, [1 / 4], 2, pooler_type)([features], box).item()

    # Cells 2 to 6 have samples at 3 and 5, or half a cell less if aligned. Warped, these 5 cells
    # start half a cell before the first, so the samples are at 2.75 and 5.25.
    assert (pooled("ROIAlign"), pooled("ROIAlignMax")) == (4, 5)
    assert (pooled("ROIAlignV2"), pooled("ROIAlignV2Max")) == (3.5, 4.5)
    assert (pooled("ROIWarp"), pooled("ROIWarpMax")) == (4, 5.25)
    assert pooled("ROIPool") == 6


@pytest.mark.parametrize("pooler_type", sorted(POOLER_TYPES))
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (1, 0)])
def test_images_without_boxes_keep_the_graph(pooler_type, counts):
    features = maps(requires_grad=True)
    out = FusedROIPooler((3, 5), SCALES, 2, pooler_type)(features, boxes(counts))
    assert out.shape == (sum(counts), 6, 3, 5)
    out.sum().backward()
    assert all(f.grad is not None for f in features)


@pytest.mark.parametrize("pooler_type", sorted(POOLER_TYPES))
def test_no_images(pooler_type):
    out = FusedROIPooler(7, SCALES, 2, pooler_type)(maps(images=0), [])
    assert out.shape == (0, 6, 7, 7)


def test_two_runs_agree_in_deterministic_mode():
    pooler, grads = FusedROIPooler(7, SCALES, 0, "ROIAlignV2"), []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            features = maps(requires_grad=True)
            pooler(features, boxes()).square().sum().backward()
            grads.append([f.grad for f in features])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooler_type": "ROIAlignRotated"}, "ROIAlignRotated' .use detectron2's ROIPooler"),
        ({"pooler_type": "ROIAligned"}, "'ROIAligned'; choose one of ROIAlign,"),
        ({"scales": [1 / 4, 1 / 16]}, "each half of the previous one"),
        ({"canonical_box_size": 0}, "canonical_box_size must be above zero"),
    ],
)
def test_refusals(changes, message):
    good = {
        "output_size": 7,
        "scales": SCALES,
        "sampling_ratio": 2,
        "pooler_type": "ROIAlignV2",
    }
    with pytest.raises(ValueError, match=message):
        FusedROIPooler(**(good | changes))


def test_wrong_numbers_of_maps_and_boxes_are_refused():
    pooler = FusedROIPooler(7, SCALES, 2, "ROIAlignV2")
    with pytest.raises(ValueError, match="expected 4 maps, one per scale, got 3"):
        pooler(maps()[:3], boxes())
    with pytest.raises(ValueError, match="expected 2 lists of boxes, one per image, got 1"):
        pooler(maps(), boxes((4,)))
