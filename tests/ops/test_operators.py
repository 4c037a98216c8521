"""The operators in torch: shapes, derivatives, compilation, determinism."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck

from mask_rcnn_plus.ops import RoIAlign, backend, fpn_roi_align, roi_align

pytestmark = pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")

SCALES = [1 / 4, 1 / 8]
BOXES = torch.tensor(
    [[0.0, 3, 4, 50, 61], [1, -9, 8, 200, 190], [1, 7, 7, 7, 7], [0, 90, 9, 4, 30]]
)


def pyramid(dtype=torch.float32, channels=3, requires_grad=False, channels_last=False):
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, 30 >> i, 40 >> i, generator=generator) for i in range(2)]
    if channels_last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    return [m.to(dtype).requires_grad_(requires_grad) for m in maps]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, channels_last):
    maps = pyramid(dtype, requires_grad=True, channels_last=channels_last)
    settings = (SCALES, 2, True, 2, 224.0, 4, channels_last)
    operators = torch.ops.mask_rcnn_plus
    torch.library.opcheck(operators.fpn_roi_align, (maps, BOXES, 3, 2, *settings))
    sizes = [size for m in maps for size in m.shape]
    grad = torch.randn(4, 3, 3, 2, dtype=dtype)
    torch.library.opcheck(operators.fpn_roi_align_backward, (grad, BOXES, sizes, *settings))


@pytest.mark.parametrize("ratio", [-1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradcheck(channels_last, ratio):
    maps = [m[..., :6, :7] for m in pyramid(torch.float64, 2)]
    if channels_last:
        maps = [m.contiguous(memory_format=torch.channels_last) for m in maps]
    maps = [m.detach().requires_grad_() for m in maps]
    gradcheck(lambda *m: fpn_roi_align(list(m), BOXES, 2, SCALES, ratio, True, "avg", 40, 3), maps)


def test_only_some_levels_may_need_a_gradient():
    maps = pyramid()
    maps[1].requires_grad_()
    fpn_roi_align(maps, BOXES, 2, SCALES, 2, True, "avg", 40, 3).sum().backward()
    assert maps[0].grad is None
    assert maps[1].grad.abs().sum() > 0


def test_second_derivative_is_refused():
    maps = torch.randn(1, 2, 8, 8, requires_grad=True)
    out = roi_align(maps, torch.tensor([[0.0, 1, 1, 5, 5]]), 2)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), maps, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        grad.sum().backward()


def test_compiles_as_one_graph_for_any_number_of_boxes():
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=compiler)
    def pooled(maps, boxes):
        return fpn_roi_align(maps, boxes, 7, SCALES, 2, True).relu()

    compilations = []
    for count in (4, 3, 2):
        maps = pyramid(requires_grad=True)
        out = pooled(maps, BOXES[:count].clone())
        expected = fpn_roi_align(pyramid(), BOXES[:count], 7, SCALES, 2, True).relu()
        assert torch.equal(out, expected)
        out.sum().backward()
        assert maps[0].grad is not None
        compilations.append(compiler.frame_count)
    assert compilations[-1] == compilations[0]


def test_exports():
    module = RoIAlign(3, 0.25, 2, aligned=True)
    maps = pyramid()[0]
    boxes_count = torch.export.Dim("boxes")
    program = torch.export.export(module, (maps, BOXES), dynamic_shapes=({}, {0: boxes_count}))
    assert torch.equal(program.module()(maps, BOXES[:2]), module(maps, BOXES[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_autocast_keeps_the_dtype_of_maps(dtype):
    maps = [m.to(dtype) for m in pyramid()]
    with torch.autocast("cpu", torch.bfloat16):
        out = fpn_roi_align(maps, BOXES, 3, SCALES, 2, True)
    assert out.dtype == dtype
    assert torch.equal(out, fpn_roi_align(maps, BOXES, 3, SCALES, 2, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_move_boxes(dtype):
    # Beyond 2048, fp16 only has even integers; a rounded box would read another column.
    maps = torch.zeros(1, 1, 2, 4096, dtype=dtype)
    maps[..., 3001] = 1
    out = roi_align(maps, torch.tensor([[0.0, 3000.5, 0.5, 3001.5, 1.5]]), 1, 1.0, 1)
    assert out.item() == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_preserved(dtype, channels_last):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    maps = bits.view(dtype).reshape(1, 64, 32, 32)
    if channels_last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    # One sample in the middle of each cell returns the map itself.
    out = roi_align(maps, torch.tensor([[0.0, 0, 0, 32, 32]]), 32, 1.0, 1, aligned=True)
    number = ~maps.isnan()
    assert torch.equal(out.isnan(), ~number)
    assert torch.equal(out[number], maps[number])


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_a_bit(dtype, channels_last, mode):
    generator = torch.Generator().manual_seed(2)
    boxes = torch.rand(150, 5, generator=generator) * 100
    boxes[:, 0] = torch.randint(0, 2, (150,), generator=generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            maps = pyramid(dtype, 48, requires_grad=True, channels_last=channels_last)
            out = fpn_roi_align(maps, boxes, 7, SCALES, 2, True, mode, 60, 3)
            out.sum().backward()
            results.append([out, *(m.grad for m in maps)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_every_row_of_the_gradient_is_summed_once(mode):
    # Several threads sum the rows of a channels_last gradient in bands. A box over the whole map is
    # visited for every band, and must only be added to the rows of that band.
    threads = torch.get_num_threads()
    maps = torch.ones(1, 128, 200, 16).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[0.0, 0, 0, 16, 200]]).repeat(3, 1)
    try:
        torch.set_num_threads(4)
        leaf = maps.requires_grad_()
        # Samples within cells and near their borders, so that bands' borders are tested.
        out = roi_align(leaf, boxes, (200, 16), 1.0, 2, True, mode)
        out.sum().backward()
    finally:
        torch.set_num_threads(threads)
    columns = leaf.grad.sum(dim=(1, 3))[0]
    # Each of the 200 rows of bins adds 3 boxes x 16 bins x 128 channels.
    assert leaf.grad.sum().item() == pytest.approx(200 * 3 * 16 * 128, rel=1e-5)
    if mode == "avg":
        # The samples at a quarter and three quarters of a cell add the same sum to every row, also
        # at the map's edges, where they are clamped.
        torch.testing.assert_close(
            columns, torch.full_like(columns, 3 * 16 * 128.0), rtol=1e-5, atol=0
        )


def test_deterministic_mode_does_not_warn(recwarn):
    maps = pyramid(requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        fpn_roi_align(maps, BOXES, 7, SCALES, 2, True).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not [w for w in recwarn if "determinis" in str(w.message)]
