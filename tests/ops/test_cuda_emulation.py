"""The CUDA kernels, run on the CPU thread by thread (cuda_emulation.h), against their definitions.

Every kernel runs twice, with its threads and blocks in different orders: equal bits mean that no
barrier is missing. test_ptx.py runs these tests on the code of CUDA's compiler. This cannot detect
how the device rounds log2f at a level border, or memory that several blocks write at the same time.
"""

import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mask_rcnn_plus.ops import backend
from tests.ops.cuda_emulation import Case, Kernels, compile_kernels

ALIGN, ALIGN_HALF, WARP, POOL = range(4)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
# Seeds of the machine: threads in any order with shared memory full of a byte, and the first ones
# first with zeros.
SCHEDULES = (1, 2)
# Positions of samples are equal everywhere; the order of sums differs.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-14,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
# For maps of 30 x 41 at 1/4 and 15 x 21 at 1/8 of an image, on both levels: inside, across borders,
# outside, inverted in one and in both axes, empty, one cell, of NaN size, far larger than the map,
# and beyond fp32.
BOXES = torch.tensor(
    [
        [0, 9.3, 6.7, 68.2, 53.9],
        [1, -24.0, -13.5, 36.1, 27.7],
        [0, 44.0, 24.0, 172.0, 133.0],
        [1, 240.0, 240.0, 320.0, 360.0],
        [0, 50.0, 13.0, 16.0, 37.0],
        [1, 48.0, 90.0, 16.0, 13.0],
        [0, 20.0, 20.0, 20.0, 20.0],
        [1, 0.0, 0.0, 4.0, 4.0],
        [0, 1.0, math.nan, 30.0, 40.0],
        [1, 1.0, 1.0, math.inf, 40.0],
        [0, -5e3, -1e3, 7e3, 2e3],
        [1, -1e30, -1e30, 1e30, 1e30],
        [0, -3e38, -3e38, 3e38, 3e38],
        [1, 30.0, 22.0, 90.0, 75.0],
        [0, 3.0, 70.0, 150.0, 110.0],
        [1, 1e9, 1e9, 1.1e9, 1.2e9],
    ]
)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulation")))


def a_case(channels=20, bins=(3, 2), ratio=2, grid=ALIGN_HALF, channels_last=True, boxes=BOXES):
    return Case(
        sizes=[(2, channels, 30, 41), (2, channels, 15, 21)],
        boxes=boxes,
        bins=bins,
        ratio=ratio,
        grid=grid,
        channels_last=channels_last,
    )


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_maps(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape).to(dtype) for shape in case.sizes]


def repeated(run: Callable[[int], Tensor | list[Tensor]]) -> Tensor | list[Tensor]:
    """Runs with every schedule, which must agree bit for bit; returns the result."""
    first, *others = (run(seed) for seed in SCHEDULES)
    for other in others:
        pair = ([x] if isinstance(x, Tensor) else x for x in (first, other))
        for a, b in zip(*pair, strict=True):
            bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
            assert torch.equal(a.view(bits), b.view(bits))
    return first


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, expected[expected.isfinite()].abs().max().item())
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True
    )


def check_average(kernels: Kernels, case: Case, dtype: torch.dtype = torch.float32) -> None:
    maps = random_maps(case, dtype)
    out = repeated(lambda seed: kernels.average(case, maps, seed))
    assert_near(out, kernels.plain_average(case, maps), dtype)


def check_average_backward(
    kernels: Kernels,
    case: Case,
    dtype: torch.dtype = torch.float32,
    grad_channels_last: bool | None = None,
) -> None:
    grad = random(*case.out_shape()).to(dtype)
    if grad_channels_last is None:
        grad_channels_last = case.channels_last
    grads = repeated(lambda seed: kernels.average_backward(case, grad, grad_channels_last, seed))
    for actual, expected in zip(grads, kernels.plain_average_backward(case, grad), strict=True):
        assert_near(actual, expected, dtype)


def check_maximum(kernels: Kernels, case: Case, dtype: torch.dtype = torch.float32) -> None:
    maps = random_maps(case, dtype)
    expected, expected_index = kernels.plain_maximum(case, maps)
    out, index = repeated(lambda seed: list(kernels.maximum(case, maps, seed)))
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(out, expected.to(dtype), rtol=0, atol=0, equal_nan=True)


def check_maximum_backward(
    kernels: Kernels,
    case: Case,
    dtype: torch.dtype = torch.float32,
    grad_channels_last: bool | None = None,
) -> None:
    _, index = kernels.plain_maximum(case, random_maps(case, dtype))
    grad = random(*case.out_shape()).to(dtype)
    if grad_channels_last is None:
        grad_channels_last = case.channels_last
    grads = repeated(
        lambda seed: kernels.maximum_backward(case, grad, grad_channels_last, index, seed)
    )
    expected = kernels.plain_maximum_backward(case, grad, index)
    for a, b in zip(grads, expected, strict=True):
        assert_near(a, b, dtype)


AVERAGES = pytest.mark.parametrize("check", [check_average, check_average_backward])
MAXIMA = pytest.mark.parametrize("check", [check_maximum, check_maximum_backward])


@pytest.mark.slow
def test_missing_barrier_is_detected(kernels):
    sums = {
        barrier: [kernels.library.sum_of_a_block(seed, barrier) for seed in range(4)]
        for barrier in (True, False)
    }
    assert sums[True] == [64 * 63 // 2] * 4
    assert len(set(sums[False])) > 1


@LAYOUTS
@DTYPES
@AVERAGES
def test_average_with_every_dtype(kernels, check, dtype, channels_last):
    check(kernels, a_case(channels=24, channels_last=channels_last), dtype)


@LAYOUTS
@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("grid", [ALIGN, ALIGN_HALF, WARP])
@AVERAGES
def test_average_on_every_grid(kernels, check, grid, ratio, channels_last):
    # An even number of channels, but not a multiple of the vector's size: one channel per thread.
    check(kernels, a_case(6, (2, 3), ratio, grid, channels_last))


# An fp32 vector has 4 channels; a block has 64 vectors forward and 128 backward.
@pytest.mark.parametrize("channels", [1, 4, 7, 68, 132])
@LAYOUTS
@AVERAGES
def test_average_with_any_number_of_channels(kernels, check, channels_last, channels):
    check(kernels, a_case(channels, (2, 2), channels_last=channels_last, boxes=BOXES[:6]))


@LAYOUTS
@pytest.mark.parametrize("check", [check_average_backward, check_maximum_backward])
def test_gradient_in_the_other_layout(kernels, check, channels_last):
    check(kernels, a_case(channels_last=channels_last), grad_channels_last=not channels_last)


@LAYOUTS
@pytest.mark.parametrize("bins", [(7, 7), (1, 1), (1, 200), (100, 2)])
@pytest.mark.parametrize(
    "check", [check_average, check_average_backward, check_maximum, check_maximum_backward]
)
def test_any_number_of_bins(kernels, check, bins, channels_last):
    # With more than 96 bins the gathering tables are filled in parts.
    check(kernels, a_case(4, bins, 2, ALIGN_HALF, channels_last, BOXES[:6]))


@LAYOUTS
@pytest.mark.parametrize(
    "check", [check_average, check_average_backward, check_maximum, check_maximum_backward]
)
def test_many_boxes_on_one_map(kernels, check, channels_last):
    # More than the 256 that a block checks at once, and many more than fit in its tables.
    corner = torch.rand(300, 2, generator=torch.Generator().manual_seed(1)) * 80
    image = torch.ones(300, 1)
    boxes = torch.cat([image, corner, corner + 25], dim=1)
    check(kernels, a_case(4, (2, 2), 2, ALIGN_HALF, channels_last, boxes))


@LAYOUTS
@pytest.mark.parametrize("bins", [(2, 2), (3, 6000)])
def test_average_without_tables(kernels, bins, channels_last):
    # The map is too large, or the bins are too many, for a block's shared memory.
    case = Case(
        sizes=[(1, 4, 6, 7000)],
        boxes=torch.tensor([[0.0, 1, 0, 6900, 5], [0, 30, 1, 90, 4], [0, -9, -2, 7100, 8]]),
        bins=bins,
        ratio=0,
        grid=ALIGN_HALF,
        channels_last=channels_last,
        scales=[1.0],
    )
    check_average(kernels, case)


@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("grid", [ALIGN, ALIGN_HALF, WARP])
def test_tables_have_room_for_every_bin(kernels, grid, ratio):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(500, 2, generator=generator) * 160 - 20
    size = torch.exp(torch.rand(500, 2, generator=generator) * 7) - 3
    boxes = torch.cat([torch.zeros(500, 1), corner, corner + size], dim=1)
    assert kernels.axes_beyond_tables(a_case(4, (7, 7), ratio, grid, boxes=boxes)) == 0


@LAYOUTS
@DTYPES
@MAXIMA
def test_maximum_with_every_dtype(kernels, check, dtype, channels_last):
    check(kernels, a_case(channels=10, channels_last=channels_last), dtype)


@LAYOUTS
@pytest.mark.parametrize(
    ("grid", "ratio"),
    [(ALIGN, 0), (ALIGN, 2), (ALIGN_HALF, 0), (ALIGN_HALF, 3), (WARP, 0), (WARP, 2), (POOL, 0)],
)
@MAXIMA
def test_maximum_on_every_grid(kernels, check, grid, ratio, channels_last):
    check(kernels, a_case(5, (2, 3), ratio, grid, channels_last, without_huge_grids(ratio)))


def without_huge_grids(ratio: int) -> Tensor:
    # The definition visits all 2^30 points of a bin of 10^30 cells, most of them outside the map.
    return BOXES if ratio else BOXES[BOXES[:, 1] > -1e20]


@LAYOUTS
def test_the_first_maximum_and_the_first_nan_win(kernels, channels_last):
    # RoIPool over cells 0 to 3 of both axes, with 2 x 2 bins of 2 x 2 cells.
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, :2, :2] = torch.tensor([[1.0, 5.0], [5.0, 5.0]])
    maps[0, 0, :2, 2:] = torch.tensor([[7.0, math.nan], [math.inf, math.nan]])
    maps[0, 0, 2:, :2] = torch.tensor([[-math.inf, -math.inf], [-math.inf, -math.inf]])
    case = Case(
        sizes=[(1, 1, 4, 4)],
        boxes=torch.tensor([[0.0, 0, 0, 3, 3]]),
        bins=(2, 2),
        ratio=0,
        grid=POOL,
        channels_last=channels_last,
        scales=[1.0],
    )
    out, index = kernels.maximum(case, [maps], 1)
    expected = torch.tensor([[5.0, math.nan], [-math.inf, 0]])
    torch.testing.assert_close(out[0, 0], expected, equal_nan=True)
    assert index[0, 0].tolist() == [[1, 1], [0, 0]]


@LAYOUTS
def test_samples_outside_count_as_zero(kernels, channels_last):
    # One bin with two samples per axis at -3 and 3. Only one of them is on the map. Map values are
    # above and below zero.
    case = Case(
        sizes=[(1, 2, 4, 4)],
        boxes=torch.tensor([[0.0, -5.5, -5.5, 6.5, 6.5], [0, 90, 90, 99, 99]]),
        bins=(1, 1),
        ratio=2,
        grid=ALIGN_HALF,
        channels_last=channels_last,
        scales=[1.0],
    )
    maps = torch.stack([torch.full((4, 4), 2.0), torch.full((4, 4), -2.0)])[None]
    out, index = kernels.maximum(case, [maps], 1)
    assert out.flatten().tolist() == [2, 0, 0, 0]
    assert index.flatten().tolist() == [0, -1, -1, -1]


@LAYOUTS
def test_infinity_does_not_spread(kernels, channels_last):
    # Zero weight times infinity would be NaN.
    case = a_case(8, (3, 3), 2, ALIGN_HALF, channels_last, BOXES[[0, 4, 13]])
    grad = random(*case.out_shape())
    grad[1, :, 1, 1] = math.inf
    grads = kernels.average_backward(case, grad, channels_last, 1)
    for actual, expected in zip(grads, kernels.plain_average_backward(case, grad), strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert not actual.isnan().any()
    maps = random_maps(case)
    for m in maps:
        m[:, :, ::3, ::4] = math.inf
    expected = kernels.plain_average(case, maps).float()
    torch.testing.assert_close(kernels.average(case, maps, 1), expected, rtol=0, atol=1e-5)
    out, index = kernels.maximum(case, maps, 1)
    expected, expected_index = kernels.plain_maximum(case, maps)
    assert torch.equal(out, expected)
    assert torch.equal(index, expected_index)
    grads = kernels.maximum_backward(case, grad, channels_last, index, 1)
    expected = kernels.plain_maximum_backward(case, grad, index)
    for a, b in zip(grads, expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("image", [2.0, -1.0, 0.5, math.nan])
def test_wrong_image_index_fails_an_assertion(kernels, image):
    boxes = BOXES[:2].clone()
    boxes[1, 0] = image
    case = a_case(boxes=boxes)
    grad = random(*case.out_shape())
    index = torch.zeros(case.out_shape(), dtype=torch.int32)
    for run in (
        lambda: kernels.average(case, random_maps(case), 1),
        lambda: kernels.maximum(case, random_maps(case), 1),
        lambda: kernels.average_backward(case, grad, True, 1),
        lambda: kernels.maximum_backward(case, grad, True, index, 1),
    ):
        with pytest.raises(RuntimeError, match=r"assertion failed.*boxes name an image"):
            run()


@pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")
@LAYOUTS
@DTYPES
@pytest.mark.parametrize("ratio", [0, 2])
def test_average_equals_the_cpu(kernels, ratio, dtype, channels_last):
    case = a_case(24, (3, 4), ratio, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [m.contiguous(memory_format=layout) for m in random_maps(case, dtype)]
    settings = (case.scales, ratio, case.grid, 2, 60.0, 3, channels_last)
    operators = torch.ops.mask_rcnn_plus
    boxes = case.boxes.double() if dtype == torch.float64 else case.boxes
    expected = operators.fpn_roi_align(maps, boxes, *case.bins, *settings)
    assert_near(kernels.average(case, maps, 1), expected.double(), dtype)
    grad = random(*case.out_shape()).to(dtype)
    sizes = [size for shape in case.sizes for size in shape]
    expected = operators.fpn_roi_align_backward(grad, boxes, sizes, *settings)
    grads = kernels.average_backward(case, grad, channels_last, 1)
    for a, b in zip(grads, expected, strict=True):
        assert_near(a, b.double(), dtype)
