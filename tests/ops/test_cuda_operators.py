"""The CUDA operators, from torch's arguments to the kernels, on CPU tensors.

The kernels are emulated (cuda_emulation.h); test_cuda_emulation.py tests them more closely.
"""

import shutil

import pytest
import torch

from mask_rcnn_plus.ops import backend
from tests.ops.cuda_emulation import load_operators

pytestmark = [
    pytest.mark.slow,  # compiles the kernels for the emulation once more
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
    pytest.mark.skipif(backend() != "native", reason="nothing to compare with"),
]

SCALES = [1 / 4, 1 / 8]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
BOXES = torch.tensor(
    [[0.0, 3, 4, 50, 61], [1, -9, 8, 200, 190], [1, 7, 7, 7, 7], [0, 90, 9, 4, 30]]
)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    load_operators(tmp_path_factory.mktemp("operators"))
    return torch.ops.mask_rcnn_plus_emulated


def pyramid(dtype=torch.float32, channels=8):
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, 30 >> i, 40 >> i, generator=generator) for i in range(2)]
    return [m.to(dtype) for m in maps]


def settings(channels_last, grid=1, ratio=2):
    return SCALES, ratio, grid, 2, 60.0, 3, channels_last


def sizes_of(maps):
    return [size for m in maps for size in m.shape]


def layout_of(channels_last):
    return torch.channels_last if channels_last else torch.contiguous_format


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_average_equals_the_cpu(emulated, dtype, channels_last):
    # In both layouts, and in neither: sliced channels, strided boxes.
    wide, boxes = pyramid(dtype, 16), torch.stack([BOXES, BOXES], dim=2)[:, :, 0]
    boxes = boxes.double() if dtype == torch.float64 else boxes
    rest = settings(channels_last)
    outs, grads = [], []
    for operators in (torch.ops.mask_rcnn_plus, emulated):
        for maps in ([m[:, ::2] for m in wide], [m[:, ::2].contiguous() for m in wide]):
            out = operators.fpn_roi_align(maps, boxes, 3, 2, *rest)
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=layout_of(channels_last))
            outs.append(out)
        grad = outs[0].float().sin().to(dtype)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            given = grad.contiguous(memory_format=memory_format)
            maps = operators.fpn_roi_align_backward(given, boxes, sizes_of(pyramid()), *rest)
            assert all(m.is_contiguous(memory_format=layout_of(channels_last)) for m in maps)
            grads.append(maps)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}.get(dtype, 1e-5)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=tolerance, atol=tolerance)
    for maps in grads[1:]:
        torch.testing.assert_close(maps, grads[0], rtol=tolerance, atol=tolerance)


@LAYOUTS
def test_expanded_gradient(emulated, channels_last):
    one = torch.ones(1, 1, 1, 1).expand(len(BOXES), 8, 3, 2)
    sizes, rest = sizes_of(pyramid()), settings(channels_last)
    given = emulated.fpn_roi_align_backward(one, BOXES, sizes, *rest)
    expected = torch.ops.mask_rcnn_plus.fpn_roi_align_backward(one, BOXES, sizes, *rest)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("grid", [1, 3])
def test_gradient_of_the_maximum_is_its_transpose(emulated, grid, channels_last):
    # Only the chosen points count, and their values are linear in the map.
    maps, rest = pyramid(torch.float64), settings(channels_last, grid)
    boxes = BOXES.double()
    out, index = emulated.fpn_roi_max(maps, boxes, 3, 2, *rest)
    assert index.dtype == torch.int32
    assert index.shape == out.shape
    assert index.is_contiguous(memory_format=layout_of(channels_last))
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = [t.contiguous(memory_format=memory_format) for t in (grad, index)]
        grads = emulated.fpn_roi_max_backward(*given, boxes, sizes_of(maps), *rest)
        pairs = zip(maps, grads, strict=True)
        assert sum((m * g).sum() for m, g in pairs).item() == pytest.approx(
            (out * grad).sum().item()
        )


def test_map_without_cells_is_refused(emulated):
    # The Python functions pad such a map to one cell of zeros.
    maps, boxes = [torch.ones(1, 3, 0, 8)], torch.tensor([[0.0, 1, 1, 5, 5]])
    with pytest.raises(RuntimeError, match="level 0 has no cells: 0 x 8"):
        emulated.fpn_roi_align(maps, boxes, 2, 3, [1.0], 2, 1, 0, 1.0, 0, False)


@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "rois"), [((2, 3, 8, 8), 0), ((2, 0, 8, 8), 3), ((0, 3, 8, 8), 0)]
)
def test_empty_inputs(emulated, shape, rois, channels_last):
    maps = [torch.ones(shape)]
    boxes = torch.tensor([[0.0, 1, 1, 5, 5]]).expand(rois, 5)
    rest = ([1.0], 2, 1, 0, 1.0, 0, channels_last)
    out = emulated.fpn_roi_align(maps, boxes, 2, 3, *rest)
    most, index = emulated.fpn_roi_max(maps, boxes, 2, 3, *rest)
    assert out.shape == most.shape == index.shape == (rois, shape[1], 2, 3)
    assert (out == 0).all()
    assert (most == 0).all()
    assert (index == -1).all()
    for grads in (
        emulated.fpn_roi_align_backward(out, boxes, list(shape), *rest),
        emulated.fpn_roi_max_backward(most, index, boxes, list(shape), *rest),
    ):
        assert grads[0].shape == shape
        assert (grads[0] == 0).all()


def test_refusals(emulated):
    maps, rest = pyramid(), settings(False)
    with pytest.raises(RuntimeError, match=r"assertion failed.*boxes name an image"):
        emulated.fpn_roi_align(maps, torch.tensor([[2.0, 1, 1, 5, 5]]), 2, 2, *rest)
    with pytest.raises(RuntimeError, match="float32, float64, float16 or bfloat16"):
        emulated.fpn_roi_align([m.int() for m in maps], BOXES, 2, 2, *rest)
    with pytest.raises(RuntimeError, match=r"gradient must have shape \(R, C"):
        emulated.fpn_roi_align_backward(torch.ones(3, 8, 2, 2), BOXES, sizes_of(maps), *rest)
    out, index = emulated.fpn_roi_max(maps, BOXES, 2, 2, *rest)
    for wrong in (index.long(), index[:, :4]):
        with pytest.raises(RuntimeError, match="index must be int32, of the gradient's shape"):
            emulated.fpn_roi_max_backward(out, wrong, BOXES, sizes_of(maps), *rest)
    # Expanded, so that it uses no memory.
    plane = [torch.ones(1, 1, 1, 1).expand(1, 1, 65536, 65536)]
    with pytest.raises(RuntimeError, match=r"fewer than 2\^31 cells; level 0 has 65536 x 65536"):
        emulated.fpn_roi_max(plane, BOXES[:1], 2, 2, [1.0], *rest[1:])
