"""The CUDA kernels as machine code: compiled by NVRTC, cached and loaded, without a GPU."""

import ctypes
import itertools
import multiprocessing
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

from mask_rcnn_plus.ops import kernels, library
from tests.ops.cuda_emulation import compile_kernels

VECTORS = "roi::cuda::average_vectors<c10::Half>"
RANK = "roi::cuda::rank_rois<float>"  # compiles in a tenth of a second
# T4, A100, RTX 30, RTX 40, H200, B200, RTX 50.
CAPABILITIES = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]


def nvrtc_or_skip() -> None:
    try:
        kernels.nvrtc_version()
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASK_RCNN_PLUS_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def compilations(monkeypatch):
    """A compiler that only counts; the target is that of a known GPU."""
    calls: list[tuple[str, str]] = []

    def compile_(kernel, target):
        calls.append((kernel, target))
        return b"name", kernel.encode() * 1000

    monkeypatch.setattr(kernels, "_compile", compile_)
    monkeypatch.setattr(kernels, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(kernels, "target_of", lambda capability: "sm_{}{}".format(*capability))
    return calls


def test_a_kernel_is_compiled_once_per_type_and_capability(cache, compilations):
    first = kernels.compiled(RANK, (9, 0))
    assert first == kernels.compiled(RANK, (9, 0)) == (b"name", RANK.encode() * 1000)
    kernels.compiled(RANK, (8, 0))
    kernels.compiled(VECTORS, (9, 0))
    assert compilations == [(RANK, "sm_90"), (RANK, "sm_80"), (VECTORS, "sm_90")]
    assert len(list(cache.iterdir())) == 3


def test_other_sources_or_another_compiler_are_compiled(cache, compilations, monkeypatch):
    kernels.compiled(RANK, (9, 0))
    changed = {**kernels._sources(), "roi_math.h": "// changed"}
    monkeypatch.setattr(kernels, "_sources", lambda: changed)
    kernels.compiled(RANK, (9, 0))
    monkeypatch.setattr(kernels, "nvrtc_version", lambda: (13, 2))
    kernels.compiled(RANK, (9, 0))
    assert len(compilations) == 3


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-1], lambda c: c[:40] + b"?" + c[41:], lambda c: b""]
)
def test_a_damaged_file_is_replaced(cache, compilations, damage):
    whole = kernels.compiled(RANK, (9, 0))
    (file,) = cache.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert kernels.compiled(RANK, (9, 0)) == whole
    assert len(compilations) == 2
    assert file.read_bytes() == content


def test_without_a_writable_cache_kernels_are_compiled_in_memory(cache, compilations, monkeypatch):
    cache.write_text("a file where the folder should be")
    for _ in range(2):
        assert kernels.compiled(RANK, (9, 0))[0] == b"name"
    assert len(compilations) == 2

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernels, "cache_folder", no_home)
    assert kernels.compiled(RANK, (9, 0))[0] == b"name"


def _compile_often(results) -> None:
    for _ in range(50):
        for file in kernels.cache_folder().glob("*"):
            file.unlink(missing_ok=True)
        results.put(kernels.compiled(RANK, (9, 0)) == (b"name", RANK.encode() * 1000))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="processes do not fork"
)
def test_several_processes_compile_and_read_at_once(cache, compilations):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forks beside torch's threads
        processes = [context.Process(target=_compile_often, args=(results,)) for _ in range(3)]
        for process in processes:
            process.start()
    assert all(results.get() for _ in range(150))
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(cache.iterdir())) <= 1  # no temporary files remain


def test_nvrtc_compiles_a_kernel(cache):
    nvrtc_or_skip()
    name, code = kernels.compiled(RANK, (9, 0))
    assert b"rank_rois" in name
    assert code.startswith(b"\x7fELF")
    assert name + b"\0" in code


def test_every_gpu_has_a_target():
    nvrtc_or_skip()
    for capability in CAPABILITIES:
        if capability < (10, 0):  # the first CUDA 12 does not know later ones
            assert kernels.target_of(capability) == "sm_{}{}".format(*capability)
    # A GPU that NVRTC does not know yet.
    target = kernels.target_of((99, 0))
    assert re.fullmatch(r"compute_\d+", target)
    name, code = kernels._compile(RANK, target)
    assert b".entry " + name in code
    with pytest.raises(kernels.Unavailable, match=r"this GPU has 3\.0"):
        kernels.target_of((3, 0))


def test_an_error_of_the_compiler_is_reported(monkeypatch):
    nvrtc_or_skip()
    broken = {**kernels._sources(), "roi_cuda_nvrtc.h": "#error on purpose"}
    monkeypatch.setattr(kernels, "_sources", lambda: broken)
    with pytest.raises(kernels.Unavailable, match=r"rank_rois<float> for sm_90: .*on purpose"):
        kernels._compile(RANK, "sm_90")


DRIVER = """
#include <cstring>
extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = ordinal; return ordinal == 0 ? 0 : 101; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = (void*)0x7fffffff0001; return 0; }
static int depth = 0, mode = 0, seen = 0;
int cuCtxPushCurrent_v2(void* context) {
  depth++;
  return context == (void*)0x7fffffff0001 ? 0 : 201;
}
int cuCtxPopCurrent_v2(void**) { depth--; return 0; }
int cuThreadExchangeStreamCaptureMode(int* other) {
  int old = mode;
  mode = *other;
  *other = old;
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)0x7fffffff0002;
  seen = mode;
  return depth == 1 && std::memcmp(image, "\\x7f" "ELF", 4) == 0 ? 0 : 200;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = (void*)name;
  return module == (void*)0x7fffffff0002 && std::strstr(name, "rank_rois") ? 0 : 500;
}
int cuGetErrorString(int, const char** text) { *text = "in words"; return 0; }
int cuLaunchKernel() { return 0; }
int cuCtxSetCurrent(void*) { return 0; }
int state() { return depth * 100 + mode * 10 + seen; }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_loading_asks_the_driver(cache, compilations, tmp_path, monkeypatch):
    source = tmp_path / "driver.cpp"
    source.write_text(DRIVER)
    path = tmp_path / "libcuda.so"
    subprocess.run(["g++", "-w", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    driver = ctypes.CDLL(str(path))
    monkeypatch.setattr(kernels, "_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    code = (b"_Zrank_rois", b"\x7fELF")
    monkeypatch.setattr(kernels, "compiled", lambda kernel, capability: code)
    function, context = kernels.load(RANK, 0)
    assert context == 0x7FFFFFFF0001
    assert ctypes.cast(function, ctypes.c_char_p).value == b"_Zrank_rois"
    # The context and the capture mode are those of before; the module was loaded in relaxed mode.
    assert driver.state() == 2
    with pytest.raises(kernels.Unavailable, match="error 101: in words"):
        kernels.load(RANK, 1)
    given: list[ctypes.c_void_p] = []
    monkeypatch.setattr(kernels, "_connect", lambda *functions: given.extend(functions))
    monkeypatch.setattr(kernels, "_current_stream", lambda: driver.cuInit)
    found, message = ctypes.c_void_p(), ctypes.create_string_buffer(2048)
    arguments = (RANK.encode(), 0, ctypes.pointer(found), ctypes.addressof(message))
    assert kernels._find(*arguments) == function
    assert found.value == context
    assert len(given) == 4
    assert all(f.value for f in given)
    code = (b"_Zrank_rois", b"not machine code")
    assert kernels._find(*arguments) is None
    assert b"error 200: in words" in message.value
    assert driver.state() == 2


def test_reasons_why_kernels_are_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert kernels.why_missing() == "this torch was built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.why_missing() == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "_nvrtc", kernels._nvrtc.__wrapped__)
    assert "libnvrtc.so.99" in kernels.why_missing(0)
    assert "'nvidia-cuda-nvrtc==99.1.*'" in kernels.how_to_fix()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "'nvidia-cuda-nvrtc-cu12==12.8.*'" in kernels.how_to_fix()


@pytest.fixture
def cuda_devices(monkeypatch):
    """Device 0 runs the kernels, device 1 does not; the list has the tried devices."""
    tried: list[int] = []

    def why_missing(device):
        tried.append(device)
        return None if device == 0 else "disabled by a test"

    monkeypatch.setattr(library, "_failures", {"cpu": None})
    monkeypatch.setattr(library, "_warned", set())
    monkeypatch.setattr(library, "_path", lambda name: Path(name))
    monkeypatch.setattr(kernels, "why_missing", why_missing)
    monkeypatch.setattr(kernels, "connect", lambda path: None)
    return tried


def test_each_device_is_tried_once(cuda_devices):
    for _ in range(2):
        assert library.backend("cuda:0") == "native"
        assert library.backend("cuda:1") == "torchvision"
    assert cuda_devices == [0, 1]


def test_a_library_that_cannot_call_cuda_is_reported(cuda_devices, monkeypatch):
    def connect(path):
        raise AttributeError("undefined symbol: roi_cuda_connect")

    monkeypatch.setattr(kernels, "connect", connect)
    assert library.backend("cuda:0") == "torchvision"
    assert "roi_cuda_connect" in library.why_missing("cuda:0")


def test_the_choice_is_a_constant_in_a_compiled_graph(cuda_devices):
    @torch.compile(fullgraph=True, backend="eager")
    def choose(x):
        devices = (torch.device("cuda", 0), torch.device("cuda", 1))
        return x + sum(library.has_native(device) for device in devices)

    assert choose(torch.zeros(())) == 1


def test_fallback_on_cuda_says_how_to_fix_it_and_what_determinism_costs(cuda_devices, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with pytest.warns(UserWarning, match="on cuda:1 .* disabled by a test.*") as caught:
        library.warn_of_fallback("cuda:1")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.warns(UserWarning, match=r"use_deterministic_algorithms.*Turn it off") as more:
        library.warn_of_fallback("cuda:1")
    assert len(caught) == len(more) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.warn_of_fallback("cuda:1")


def parameter_sizes(cubin: bytes) -> list[int]:
    """Of the one kernel in a cubin, from its note EIATTR_KPARAM_INFO."""
    found = {}
    # Format EIFMT_SVAL, the attribute, and 12 bytes: an index of 0, the parameter's number, its
    # offset, and its size from bit 18 on, above what is the same for all parameters.
    for match in re.finditer(rb"\x04\x17\x0c\x00\x00{4}(.{2}).{2}(.{4})", cubin, re.DOTALL):
        word = int.from_bytes(match[2], "little")
        if word >> 12 & 0x1F == 0x1F:  # the constant bank
            found[int.from_bytes(match[1], "little")] = word >> 18
    return [found[ordinal] for ordinal in sorted(found)]


def tool(name: str) -> str:
    """A program of the CUDA toolkit, which triton contains too."""
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(path) if path.is_file() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}")
    return found


# Of 65536 registers per block of 256 threads, for kernels with a bound of 1, 2, 3 and 4 blocks.
MOST_REGISTERS = {1: 255, 2: 128, 3: 80, 4: 64}


def most_registers(kernel: str) -> int:
    fp64 = kernel.endswith("<double>")
    if "average_" in kernel:
        return MOST_REGISTERS[2 if fp64 else 4]
    if "spread_vectors" in kernel:
        return MOST_REGISTERS[2 if fp64 else 3]
    return MOST_REGISTERS[1 if "_rois" in kernel else 2]


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """The kernels as the host sees them."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return compile_kernels(tmp_path_factory.mktemp("emulation"))


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda c: "sm_{}{}".format(*c))
def test_machine_code_of_every_kernel(capability, host, tmp_path):
    nvrtc_or_skip()
    cuobjdump = tool("cuobjdump")
    target = kernels.target_of(capability)
    if not target.startswith("sm_"):
        pytest.skip(f"NVRTC compiles PTX of {target} for it")
    for kernel in kernels.KERNELS:
        name, code = kernels._compile(kernel, target)
        path = tmp_path / "kernel.cubin"
        path.write_bytes(code)

        def dump(option: str, path: Path = path) -> str:
            command = [cuobjdump, option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        # The driver reads arguments of the sizes that the host passes.
        sizes = itertools.takewhile(bool, host.parameter_sizes(kernel.encode()))
        assert parameter_sizes(code) == list(sizes), kernel

        usage = dump("-res-usage")
        assert name.decode() in usage
        values = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
        print(target, kernel, values)
        assert values["STACK"] == values["LOCAL"] == "0", (kernel, values)  # so nothing is spilled
        assert int(values["REG"]) <= most_registers(kernel), (kernel, values)
        # With at most 40 KiB of tables, in the 48 KiB that need no request.
        assert int(values["SHARED"]) <= 1024

        accesses = set(re.findall(r"\b(?:LDG|STG|LDL|STL|LD|ST)\.[\w.]+", dump("-sass")))
        assert not any(re.match(r"(LDL|STL|LD|ST)\.", access) for access in accesses), accesses
        if "_vectors" in kernel:
            assert any(re.match(r"LDG\.E\S*\.128", access) for access in accesses), accesses
            stores = {access for access in accesses if access.startswith("STG")}
            assert stores
            assert all(".128" in store for store in stores), (kernel, stores)
