"""Memory of the compiled RoIAlign: little more than its result, whatever the number of samples."""

import json

import pytest

from mask_rcnn_plus.ops import backend
from tests.memory import linux_only, run_alone

ROIS, BINS, CHANNELS = 2000, 7, 64

SCRIPT = f"""
import json, torch
from mask_rcnn_plus.ops import fpn_roi_align
from tests.memory import extra, resident
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
corner = torch.rand({ROIS}, 2, generator=generator) * 500
side = 16 * 50 ** torch.rand({ROIS}, 1, generator=generator)
boxes = torch.cat([torch.zeros({ROIS}, 1), corner, corner + side], dim=1)
rows = []
for memory_format in (torch.contiguous_format, torch.channels_last):
    for dtype in (torch.float32, torch.bfloat16):
        shapes = [(1, {CHANNELS}, 200 >> i, 336 >> i) for i in range(4)]
        maps = [torch.randn(shape, generator=generator) for shape in shapes]
        maps = [m.to(dtype).contiguous(memory_format=memory_format) for m in maps]
        maps = [m.requires_grad_() for m in maps]
        def forward(ratio, maps=maps):
            return fpn_roi_align(maps, boxes, {BINS}, [1/4, 1/8, 1/16, 1/32], ratio, True)
        torch.autograd.grad(forward(2).sum(), maps)  # one-time initialisation
        row = dict(itemsize=dtype.itemsize, cells=sum(m.numel() for m in maps))
        for ratio in (2, 16, 0):
            out = forward(ratio)
            grad = torch.ones_like(out)
            row["forward %d" % ratio] = extra(lambda: forward(ratio))
            row["backward %d" % ratio] = extra(
                lambda: torch.autograd.grad(out, maps, grad, retain_graph=True)
            )
            del out, grad
        before = resident()
        for _ in range(20):
            fresh = [m.detach().clone().requires_grad_() for m in maps]
            torch.autograd.grad(forward(2, fresh).sum(), fresh)
        del fresh
        row["kept"] = resident() - before
        rows.append(row)
print(json.dumps(rows))
"""

MIB = 2**20


@pytest.mark.slow
@linux_only
@pytest.mark.skipif(backend() != "native", reason="the operators are not compiled")
def test_memory_is_the_result_and_a_bounded_scratch() -> None:
    for row in json.loads(run_alone(SCRIPT)):
        out = ROIS * CHANNELS * BINS**2 * row["itemsize"] / MIB
        maps = row["cells"] * row["itemsize"] / MIB
        for ratio in (2, 16, 0):
            assert 0.9 * out < row[f"forward {ratio}"] < out + 12, row
            assert 0.9 * maps < row[f"backward {ratio}"] < maps + 12, row
        # 16 samples per axis are 64 times as many as 2: 25 million in all. One float per sample
        # would need 96 MiB, and 16 bytes per row and per column of samples 7 MiB.
        for direction in ("forward", "backward"):
            assert row[f"{direction} 16"] - row[f"{direction} 2"] < 2, row
        assert row["kept"] < 2, row
