"""The implementation and instruction set in use, and the fallback without compiled operators."""

import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from mask_rcnn_plus.ops import backend, library, roi_align
from mask_rcnn_plus.ops.arguments import Grid
from mask_rcnn_plus.ops.roi_ops import pool_pyramid

SCALES = [1 / 4, 1 / 8]
BOXES = torch.tensor(
    [[0.0, 3, 4, 50, 61], [1, -9, 8, 200, 190], [1, 7, 7, 7, 7], [0, 90, 9, 4, 30]]
)


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setitem(library._failures, "cpu", "disabled by a test")
    monkeypatch.setattr(library, "_warned", set())


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))),
    reason="no C++ compiler: torchvision's operators are used",
)
def test_compiled_operators_are_used():
    # With a compiler, using the fallback means that the build is broken.
    assert backend() == "native"


def pool_and_grad(dtype, grid=Grid.ALIGN_HALF, mode="avg", ratio=2):
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 20, 30 >> i, 40 >> i, generator=generator).to(dtype) for i in range(2)]
    maps = [m.requires_grad_() for m in maps]
    out = pool_pyramid(maps, BOXES, (3, 2), SCALES, ratio, grid, mode, 60, 3)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype))
    return out.detach(), [m.grad for m in maps]


@pytest.mark.parametrize(
    ("grid", "mode", "ratio"),
    [
        (Grid.ALIGN_HALF, "avg", 2),
        (Grid.ALIGN, "max", 2),
        (Grid.ALIGN_HALF, "max", -1),
        (Grid.WARP, "avg", -1),
        (Grid.WARP, "max", 3),
        (Grid.POOL, "max", 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fallback_has_the_same_results(dtype, grid, mode, ratio, monkeypatch):
    out, grads = pool_and_grad(dtype, grid, mode, ratio)
    monkeypatch.setitem(library._failures, "cpu", "disabled by a test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other, other_grads = pool_and_grad(dtype, grid, mode, ratio)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads, other_grads, rtol=tolerance, atol=tolerance)


def test_fallback_warns_once(without_native):
    assert backend() == "torchvision"
    maps = torch.ones(1, 1, 8, 8)
    with pytest.warns(UserWarning, match="disabled by a test.*install a C\\+\\+ compiler"):
        roi_align(maps, BOXES[:1], 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        roi_align(maps, BOXES[:1], 2)


@pytest.mark.filterwarnings("ignore:RoI operators on cpu")
def test_fallback_treats_unusual_boxes_as_documented(without_native):
    maps = torch.ones(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match=r"boxes\[0\] names image 2"):
        roi_align(maps, torch.tensor([[2.0, 1, 1, 5, 5]]), 2)
    out = roi_align(maps, torch.tensor([[0, 1.0, 1, 5, torch.nan], [1, 1, 1, 5, 5]]), 2)
    assert out[0].isnan().all()
    assert (out[1] == 1).all()
    assert roi_align(maps, torch.zeros(0, 5), 2).shape == (0, 3, 2, 2)


def test_library_that_does_not_load_gives_a_reason_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert "contains no _roi_cpu" in library._load("_roi_cpu")
    (tmp_path / "_roi_cpu.abi3.so").write_text("not a library")
    assert "does not load" in library._load("_roi_cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda_operators_are_claimed_without_a_device():
    assert backend("cuda") == "torchvision"
    assert library.why_missing("cuda")


# Runs in a subprocess, since the instruction set is chosen once per process.
PARITY = """
import torch
from torchvision.ops import roi_align as theirs
from mask_rcnn_plus.ops import roi_align
torch.manual_seed(0)
boxes = torch.rand(30, 5) * 30
boxes[:, 3:] += boxes[:, 1:3]
boxes[:, 0] = torch.arange(30) % 2
for channels in (3, 16, 70, 280):
    x = torch.randn(2, channels, 21, 33)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-4),
                                 (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
            a = x.to(dtype).clone(memory_format=memory_format).requires_grad_()
            b = a.detach().clone().float().requires_grad_()
            out, expected = roi_align(a, boxes, 5, 0.5, 2), theirs(b, boxes, 5, 0.5, 2)
            grad = torch.randn_like(expected).to(dtype)
            out.backward(grad)
            expected.backward(grad.float())
            assert (out.float() - expected).abs().max() < tolerance, (channels, dtype)
            assert (a.grad.float() - b.grad).abs().max() < 4 * tolerance, (channels, dtype)
            # The maximum of the samples equals the maximum over bins with one sample each.
            a = x.to(dtype).clone(memory_format=memory_format).requires_grad_()
            b = a.detach().clone().float().requires_grad_()
            out = roi_align(a, boxes, 5, 0.5, 2, mode="max")
            expected = torch.nn.functional.max_pool2d(theirs(b, boxes, 10, 0.5, 1), 2)
            out.backward(grad)
            expected.backward(grad.float())
            # Ten bins round the positions of samples differently from five bins.
            assert (out.float() - expected).abs().max() < 4 * tolerance, (channels, dtype)
            assert (a.grad.float() - b.grad).abs().max() < 8 * tolerance, (channels, dtype)
bits = torch.arange(-2**15, 2**15, dtype=torch.int16)
for dtype in (torch.float16, torch.bfloat16):
    x = bits.view(dtype).reshape(1, 64, 32, 32)
    for maps in (x, x.contiguous(memory_format=torch.channels_last)):
        out = roi_align(maps, torch.tensor([[0.0, 0, 0, 32, 32]]), 32, 1.0, 1, aligned=True)
        assert torch.equal(out.isnan(), x.isnan())
        assert torch.equal(out[~x.isnan()], x[~x.isnan()])
# Ties round to even: the mean of two neighbours.
for dtype in (torch.float16, torch.bfloat16):
    low = torch.arange(0, 0x7bff if dtype is torch.float16 else 0x7f7e, dtype=torch.int16)
    pair = torch.stack([low.view(dtype), (low + 1).view(dtype)])
    pair = pair.t().reshape(1, -1, 1, 2)
    out = roi_align(pair, torch.tensor([[0.0, 0.5, 0, 1.5, 1]]), 1, 1.0, 1, aligned=True)
    expected = (pair.double().mean(3)).to(dtype)
    assert torch.equal(out.flatten(), expected.flatten()), dtype
print("parity on", torch.ops.mask_rcnn_plus.cpu_isa())
"""


@pytest.mark.slow
@pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline"])
def test_every_instruction_set_agrees(isa):
    process = subprocess.run(
        [sys.executable, "-c", PARITY],
        env=os.environ | {"MASK_RCNN_PLUS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    chosen = process.stdout.split()[-1]
    if chosen != isa:
        pytest.skip(f"this machine runs {chosen} at best")
