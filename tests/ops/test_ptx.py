"""The kernels as CUDA's compiler translates them: PTX by NVRTC, run on the CPU (ptx.py).

They pass the tests of test_cuda_emulation.py; and changed kernels, such as one without a barrier,
do not. This cannot show what the GPU's assembler does, the memory order between threads, or time.
"""

import ctypes
import os
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.ops import cuda_emulation, test_cuda_emulation
from tests.ops.ptx import compile_ptx
from tests.ops.test_cuda_emulation import (
    a_case,
    check_average,
    check_average_backward,
    check_maximum,
    check_maximum_backward,
)

kernels_module = pytest.importorskip("mask_rcnn_plus.ops.kernels")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]
# The oldest capability with instructions for every type.
TARGET = "compute_80"
_UNCHANGED = ("test_missing_barrier_is_detected", "test_tables_have_room_for_every_bin")
globals().update(
    {
        name: test
        for name, test in vars(test_cuda_emulation).items()
        if name.startswith("test_") and name not in _UNCHANGED
    }
)


class PtxKernels(cuda_emulation.Kernels):
    """The kernels of a library of ptx.py; ``host`` is the code that launches them."""

    def __init__(self, host: Path, path: Path) -> None:
        self.ptx = ctypes.CDLL(str(path))
        # A copy, since the host's code asks once for each kernel.
        library = cuda_emulation.load_kernels(Path(shutil.copy(host, path.with_suffix(".host.so"))))
        super().__init__(library)
        library.connect(self.ptx.ptx_find, self.ptx.ptx_launch)

    def _run(self, name, case, dtype, seed, *arguments):
        self.ptx.ptx_seed(ctypes.c_uint64(seed))
        super()._run(name, case, dtype, seed, *arguments)


def ptx_of(names):
    try:
        pairs = {name: kernels_module._compile(name, TARGET)[1] for name in names}
    except kernels_module.Unavailable as reason:
        pytest.skip(str(reason))
    return {name: ptx.rstrip(b"\0").decode() for name, ptx in pairs.items()}


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return cuda_emulation.compile_library("ptx_host", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def kernels(host, tmp_path_factory):
    ptx = ptx_of(kernels_module.KERNELS)
    return PtxKernels(host, compile_ptx(ptx, tmp_path_factory.mktemp("ptx") / "kernels.so"))


@pytest.fixture(autouse=True)
def schedules(monkeypatch):
    # Also the last threads first.
    monkeypatch.setattr(test_cuda_emulation, "SCHEDULES", (1, 2, 5))


class Mutant(NamedTuple):
    """A change of a kernel that its check must detect."""

    kernel: str
    file: str
    old: str
    new: str
    number: int = 0  # of the place to change, among those that are equal


BARRIER = "__syncthreads();"
CHECKS = {
    "average": check_average,
    "spread": check_average_backward,
    "max": check_maximum,
    "spread_maxima": check_maximum_backward,
}
MUTANTS = {
    **{
        f"{kernel} without barrier {number} of {file}": Mutant(kernel, file, BARRIER, "", number)
        for kernel, file, numbers in (
            ("average_elements", "average", (0, 1)),
            ("max_elements", "max", (0, 1)),
            ("spread_elements", "average_backward", (0, 1, 3)),
            ("spread_maxima", "max_backward", (0, 1, 2)),
            ("spread_maxima", "gather", (0, 1, 2)),
        )
        for number in numbers
    },
    "vector load shifted by an element": Mutant(
        "average_vectors", "average", "load_vector(map + ", "load_vector(map + 1 + "
    ),
    "vector load of another vector": Mutant(
        "spread_vectors", "average_backward", "weights_x + x * kColumns", "weights_x + 0 * kColumns"
    ),
    "table written beyond its end": Mutant(
        "average_elements", "average", "if (count < slots) out[count]", "out[count + 4096]"
    ),
    "channel of the neighbour": Mutant(
        "average_elements", "average", "map[c * from.channel", "map[(c ^ 1) * from.channel"
    ),
    "dropped tap": Mutant("average_elements", "average", "j < count_x;", "j < count_x - 1;"),
    "dropped row of taps": Mutant(
        "spread_elements", "average_backward", "y < in_y.end;", "y < in_y.end - 1;", 1
    ),
    "bins of another RoI": Mutant(
        "max_elements", "max", "points_of(roi.y, bin)", "points_of(roi.y, bin / 2)"
    ),
    "division by the wrong width": Mutant(
        "spread_maxima", "max_backward", "point % width", "point % (width + 1)"
    ),
    "lanes missing in a sum": Mutant(
        "rank_rois", "gather", "step = kWarp / 2; step > 0", "step = 8; step > 0"
    ),
}


def check_of(kernel):
    """The check of a kernel, with RoIs that share tiles and reach beyond the map."""
    kind = kernel if kernel in CHECKS else kernel.partition("_")[0]
    boxes = torch.cat([test_cuda_emulation.BOXES[:8]] * 6)
    case = a_case(8, channels_last="vectors" in kernel, boxes=boxes)
    return partial(CHECKS.get(kind, check_average_backward), case=case)


@pytest.mark.parametrize("kernel", sorted({mutant.kernel for mutant in MUTANTS.values()}))
def test_an_unchanged_kernel_passes(kernel, kernels):
    check_of(kernel)(kernels)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_changed_kernel_is_detected(name, host, tmp_path, monkeypatch):
    mutant = MUTANTS[name]
    sources = dict(kernels_module._sources())
    file = f"roi_cuda_{mutant.file}.cuh"
    parts = sources[file].split(mutant.old)
    before = mutant.old.join(parts[: mutant.number + 1])
    after = mutant.old.join(parts[mutant.number + 1 :])
    assert after, "the sources do not contain what the mutant changes"
    sources[file] = before + mutant.new + after
    monkeypatch.setattr(kernels_module, "_sources", lambda: sources)
    names = [f"roi::cuda::{mutant.kernel}<float>"]
    if mutant.kernel.startswith("spread"):
        names += ["roi::cuda::plan_rois<float>", "roi::cuda::rank_rois<float>"]
    if mutant.kernel == "rank_rois":
        names += ["roi::cuda::plan_rois<float>", "roi::cuda::spread_elements<float>"]
    changed = PtxKernels(host, compile_ptx(ptx_of(names), tmp_path / "kernels.so"))
    result = outcome(partial(check_of(mutant.kernel), changed))
    assert result != "passed"
    assert "not translated" not in result


def outcome(run) -> str:
    """What a function does in a process of its own, which a wrong address or number may end."""
    reader, writer = os.pipe()
    if (process := os.fork()) == 0:
        text = "passed"
        # A wrong number may also make a loop long.
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        try:
            run()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text[:1000].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read().decode(errors="replace")
    os.waitpid(process, 0)
    text = text or "ended by a signal"
    print(text.splitlines()[0])
    return text
