"""Tests that need a GPU: deterministic results, no waits for the device, and memory.

Values are tested on every machine, in test_cuda_emulation.py.
"""

import os
import subprocess
import sys

import pytest
import torch

from mask_rcnn_plus.ops import backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or backend("cuda") != "native",
        reason="no CUDA device, or the operators are not compiled for it",
    ),
]

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
operators = torch.ops.mask_rcnn_plus


def random_maps(channels_last, dtype=torch.float32, channels=32, device="cuda"):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(3)
    maps = [torch.randn(2, channels, 100 >> i, 152 >> i, generator=generator) for i in range(4)]
    return [m.to(device, dtype).contiguous(memory_format=layout) for m in maps]


def random_boxes(count=400, dtype=torch.float32, device="cuda"):
    generator = torch.Generator().manual_seed(4)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([600.0, 400.0]) - 20
    size = torch.exp(torch.rand(count, 2, generator=generator) * 4) * 8
    image = torch.randint(0, 2, (count, 1), generator=generator)
    boxes = torch.cat([image, corner, corner + size], dim=1).to(device)
    # fp64 maps need fp64 boxes, all others fp32 boxes.
    return boxes.double() if dtype == torch.float64 else boxes


def settings(channels_last, ratio=2, grid=1):
    return SCALES, ratio, grid, 2, 224.0, 4, channels_last


def sizes_of(maps):
    return [size for m in maps for size in m.shape]


def random_like(out):
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return grad.to(out.device, out.dtype)


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("grid", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0, 2])
def test_average_equals_the_cpu(ratio, grid, dtype, channels_last):
    results = []
    for device in ("cpu", "cuda"):
        maps = random_maps(channels_last, dtype, device=device)
        boxes = random_boxes(dtype=dtype, device=device)
        rest = settings(channels_last, ratio, grid)
        out = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
        grad = random_like(out)
        grads = operators.fpn_roi_align_backward(grad, boxes, sizes_of(maps), *rest)
        results.append([out, *grads])
    for a, b in zip(*results, strict=True):
        scale = a.double().abs().max()
        assert (a.double() - b.cpu().double()).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("mask_rcnn_plus::fpn_roi_max", "CPU"),
    reason="the CPU has no maximum to compare with",
)
@LAYOUTS
@DTYPES
@pytest.mark.parametrize(("grid", "ratio"), [(0, 2), (1, 2), (1, 0), (2, 2), (3, 0)])
def test_maximum_equals_the_cpu(ratio, grid, dtype, channels_last):
    results = []
    for device in ("cpu", "cuda"):
        maps = random_maps(channels_last, dtype, device=device)
        boxes = random_boxes(dtype=dtype, device=device)
        rest = settings(channels_last, ratio, grid)
        out, index = operators.fpn_roi_max(maps, boxes, 7, 7, *rest)
        grad = random_like(out)
        grads = operators.fpn_roi_max_backward(grad, index, boxes, sizes_of(maps), *rest)
        results.append([out, index, *grads])
    (out, index, *grads), (cuda_out, cuda_index, *cuda_grads) = results
    assert torch.equal(index, cuda_index.cpu())
    assert torch.equal(out, cuda_out.cpu())
    for a, b in zip(grads, cuda_grads, strict=True):
        scale = a.double().abs().max()
        assert (a.double() - b.cpu().double()).abs().max() <= TOLERANCE[dtype] * scale


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hundred_runs_are_bitwise_equal(dtype, channels_last):
    maps, boxes, rest = random_maps(channels_last, dtype), random_boxes(), settings(channels_last)

    def run():
        out = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
        most, index = operators.fpn_roi_max(maps, boxes, 7, 7, *rest)
        grad = random_grad.to(dtype)
        grads = operators.fpn_roi_align_backward(grad, boxes, sizes_of(maps), *rest)
        more = operators.fpn_roi_max_backward(grad, index, boxes, sizes_of(maps), *rest)
        return [out, most, index, *grads, *more]

    random_grad = random_like(torch.empty(len(boxes), 32, 7, 7, device="cuda"))
    first = run()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@LAYOUTS
def test_nothing_waits_for_the_device(channels_last):
    maps, boxes, rest = random_maps(channels_last), random_boxes(), settings(channels_last)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
        operators.fpn_roi_align_backward(out, boxes, sizes_of(maps), *rest)
        out, index = operators.fpn_roi_max(maps, boxes, 7, 7, *rest)
        operators.fpn_roi_max_backward(out, index, boxes, sizes_of(maps), *rest)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@LAYOUTS
def test_cuda_graph_replays_with_other_boxes(channels_last):
    maps, boxes, rest = random_maps(channels_last), random_boxes(), settings(channels_last)
    expected = operators.fpn_roi_align(maps, boxes.flip(0), 7, 7, *rest)
    expected_grads = operators.fpn_roi_align_backward(
        expected, boxes.flip(0), sizes_of(maps), *rest
    )
    given = boxes.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = operators.fpn_roi_align(maps, given, 7, 7, *rest)
        operators.fpn_roi_align_backward(out, given, sizes_of(maps), *rest)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = operators.fpn_roi_align(maps, given, 7, 7, *rest)
        grads = operators.fpn_roi_align_backward(out, given, sizes_of(maps), *rest)
    given.copy_(boxes.flip(0))
    graph.replay()
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_needs_little_memory_beyond_its_own(dtype, channels_last):
    maps, boxes, rest = random_maps(channels_last, dtype), random_boxes(), settings(channels_last)
    grad = operators.fpn_roi_align(maps, boxes, 7, 7, *rest)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    # Counts requested bytes, since the allocated blocks may be up to a MiB larger.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    operators.fpn_roi_align_backward(grad, boxes, sizes_of(maps), *rest)
    taken = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    gradients = sum(m.numel() * m.element_size() for m in maps)
    # 84 bytes per RoI, and the begin of each map's RoIs.
    assert taken <= gradients + 100 * len(boxes) + 8192


BAD_IMAGE = """
import torch
from mask_rcnn_plus.ops import backend
maps = [torch.ones(2, 8, 16, 16, device="cuda")]
boxes = torch.tensor([[{image}, 1.0, 1.0, 5.0, 5.0]], device="cuda")
torch.ops.mask_rcnn_plus.fpn_roi_align(maps, boxes, 2, 2, [1.0], 2, 1, 0, 1.0, 0, False)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("image", ["2.0", "-1.0", "0.5", "float('nan')"])
def test_wrong_image_index_fails_an_assertion(image):
    # Runs in a subprocess, since the device is unusable afterwards.
    process = subprocess.run(
        [sys.executable, "-c", BAD_IMAGE.format(image=image)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
    assert "device-side assert" in process.stderr
    assert "boxes name an image that the features do not hold" in process.stdout + process.stderr


@LAYOUTS
@pytest.mark.parametrize(
    ("maps", "rois"), [((2, 3, 8, 8), 0), ((2, 0, 8, 8), 3), ((0, 3, 8, 8), 0)]
)
def test_empty_inputs(maps, rois, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = [torch.ones(maps, device="cuda").contiguous(memory_format=layout)]
    boxes = torch.tensor([[0.0, 1, 1, 5, 5]], device="cuda").expand(rois, 5)
    rest = ([1.0], 2, 1, 0, 1.0, 0, channels_last)
    out = operators.fpn_roi_align(features, boxes, 2, 3, *rest)
    most, index = operators.fpn_roi_max(features, boxes, 2, 3, *rest)
    assert out.shape == most.shape == index.shape == (rois, maps[1], 2, 3)
    assert (out == 0).all()
    assert (most == 0).all()
    assert (index == -1).all()
    for grads in (
        operators.fpn_roi_align_backward(out, boxes, list(maps), *rest),
        operators.fpn_roi_max_backward(most, index, boxes, list(maps), *rest),
    ):
        assert grads[0].shape == maps
        assert (grads[0] == 0).all()


def test_gradient_with_any_strides():
    maps, boxes, rest = random_maps(True), random_boxes(), settings(True)
    one = torch.ones(1, 1, 1, 1, device="cuda").expand(len(boxes), 32, 7, 7)
    given = operators.fpn_roi_align_backward(one, boxes, sizes_of(maps), *rest)
    dense = operators.fpn_roi_align_backward(one.contiguous(), boxes, sizes_of(maps), *rest)
    for a, b in zip(given, dense, strict=True):
        assert torch.equal(a, b)


@LAYOUTS
def test_more_than_two_to_the_31_elements(channels_last):
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.empty(
        1, 2, 36000, 36000, dtype=torch.bfloat16, device="cuda", memory_format=layout
    ).zero_()
    features[:, :, -4:, -4:] = torch.tensor([3.0, 5.0], device="cuda")[:, None, None]
    box = torch.tensor([[0.0, 35997, 35997, 35999, 35999]], device="cuda")
    rest = ([1.0], 2, 1, 0, 1.0, 0, channels_last)
    out = operators.fpn_roi_align([features], box, 2, 2, *rest)
    assert (out.cpu() == torch.tensor([3.0, 5.0])[:, None, None]).all()
    (grad,) = operators.fpn_roi_align_backward(out, box, list(features.shape), *rest)
    assert grad[:, :, -4:, -4:].float().sum().item() == pytest.approx(4 * 3 + 4 * 5)
    assert grad[:, :, :-4].abs().max() == 0
