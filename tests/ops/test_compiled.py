"""fpn_roi_align inside torch.compile with its default backend, for any number of boxes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mask_rcnn_plus.ops import backend, fpn_roi_align

SCALES = [1 / 4, 1 / 8]

pytestmark = [
    pytest.mark.skipif(backend() != "native", reason="the operators are not compiled"),
    pytest.mark.skipif(
        not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))),
        reason="torch's code generator needs a C++ compiler",
    ),
]


def inputs(count: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    maps = [torch.randn(2, 8, 30 >> i, 40 >> i, generator=generator) for i in range(2)]
    corner, size = torch.rand(2, count, 2, generator=generator) * 90
    image = torch.arange(count)[:, None] % 2
    return [m.requires_grad_() for m in maps], torch.cat([image, corner, corner + size], dim=1)


@pytest.mark.slow
def test_compiled_code_accepts_any_number_of_boxes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Compiles in this process, since torch's pool of compiler processes would outlive the test.
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("inductor")

    def pooled(maps: list[torch.Tensor], boxes: torch.Tensor) -> torch.Tensor:
        return fpn_roi_align(maps, boxes, 7, SCALES, 2, True, "avg", 60, 3).relu()

    compiled = torch.compile(pooled, fullgraph=True, dynamic=True, backend=compiler)
    compilations = {}
    for count in (17, 300, 1, 0, 2, 299):
        maps, boxes = inputs(count)
        twins = [m.detach().clone().requires_grad_() for m in maps]
        out, expected = compiled(maps, boxes), pooled(twins, boxes)
        assert torch.equal(out, expected)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        out.backward(grad)
        expected.backward(grad)
        for ours, theirs in zip(maps, twins, strict=True):
            assert torch.equal(ours.grad, theirs.grad)
        assert any(m.grad.any() for m in twins) == (count > 0)
        compilations[count] = compiler.frame_count
    # torch compiles sizes 0 and 1 separately; all other sizes share one compilation.
    assert compilations[300] == compilations[17]
    assert compilations[0] <= compilations[17] + 2
    assert compilations[299] == compilations[2] == compilations[0]
